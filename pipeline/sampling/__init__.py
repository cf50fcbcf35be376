"""Choosing tokens from logits: plain functions, composed per request."""
