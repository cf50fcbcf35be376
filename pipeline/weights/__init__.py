"""Weights between checkpoint files and memory, converted while they are read."""
