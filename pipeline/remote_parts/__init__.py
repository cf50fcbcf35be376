"""Work of a model's layers that a stage asks another worker for, whom nobody trusts with it.

The stage runs where its user trusts it, mostly beside the orchestrator. Its layers are given parts
(`pipeline.models.layer_parts`) that ask over a `PartLink`, an ordinary secure channel with
questions one way and answers the other; a `PartServer` at its other end hands each to a handler.
What is asked is a mode's own: this room knows frames, not what they mean. While the question of one
half of a batch is away, `Lanes` has the other half computed.
"""
