"""How activations look while they travel between stages.

Rows of float32 come in from a stage's layers, tensors for a frame leave, and back on the other
side. A codec alone knows its wire: its name, its tensors, what it refuses. The manifest names one,
the session's limits carry it, nobody else looks inside.
"""
