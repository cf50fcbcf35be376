"""Authenticated, attested, encrypted channels for tensors; knows neither torch nor the pipeline."""
