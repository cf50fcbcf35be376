"""veilpipe's inference pipeline, a room for each part, divided by who runs the code.

A stage's machine runs `stage` and what lies under it, the user's the rest; `cli` hands each its
parts. What lies in this folder itself (errors, dtypes, tasks, files) belongs to all. How a token
passes through all of it is in DESIGN.md, every byte that travels in PROTOCOL.md.
"""
