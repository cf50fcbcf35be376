"""The arithmetic: one interface, and what computes it with AVX-512, torch or CUDA."""
