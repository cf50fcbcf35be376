"""The OpenAI-compatible server, on the user's side of the pipeline.

A request comes in as JSON, is admitted, rendered, encoded and bounded, and becomes a generation of
the engine; its tokens leave as text, whole or streamed. It believes no client, and no model either.
"""
