"""The OpenAI-compatible HTTP API, served on the user's side of the pipeline."""
