"""Weights from checkpoint files to memory.

Files come in, verified by their hash in the one pass that reads them; each tensor is converted
block by block into a sink, which is where a model wants it. Called by models, planning and tests.
"""
