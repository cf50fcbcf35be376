"""Model architectures, one file each.

A config.json and a range of layers come in, a shard leaves: something that takes token ids or rows
and a KV cache, and gives rows or tokens. `registry` is the only door; stage and planning use it.
"""
