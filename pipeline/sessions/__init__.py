"""Sessions that outlive a request: what a slot holds, kept sealed under a name, and taken up again.

Keys and values of a slot come in as `KVCache.export` gives them, become chunks sealed under a key
that the user's machine derives, and lie in a store that nobody trusts: memory, a file, Redis. What
leaves is what was put in, or an error: a root kept at home tells an older or foreign state apart.
"""
