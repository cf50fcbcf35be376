"""Model architectures, their weights and their KV caches; one file per architecture."""
