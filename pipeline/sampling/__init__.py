"""Choosing tokens from logits: plain functions, composed per request.

A row of logits and a request's wishes come in, one token id leaves. No I/O, no state but a
request's own; the same on the user's machine and on a last stage.
"""
