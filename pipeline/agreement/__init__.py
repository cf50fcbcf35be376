"""What everybody must agree on before anything is said.

A manifest comes in as JSON somebody wrote; what leaves is frozen and checked: which layers run
where, what must run there, and a hash of it that every channel binds. `trust_policy` turns it into
what a handshake demands of each peer. Called by whoever opens or accepts a channel, and by
planning.
"""
