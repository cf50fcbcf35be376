"""What everybody must agree on before anything is said: the manifest, and whom to trust."""
