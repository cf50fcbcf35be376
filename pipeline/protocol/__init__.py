"""What orchestrator and stages say to each other, and how they meet and part.

Bytes from an authenticated but untrusted peer come in; typed messages and step headers leave, each
held against the session's limits before anything is stored for it. Both sides of a pipeline call
this, and nothing here knows which one it is on.
"""
