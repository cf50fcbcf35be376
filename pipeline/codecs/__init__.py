"""How activations look while they travel between stages."""
