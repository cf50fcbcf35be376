"""Stages on the nodes of a Ray cluster, which may be anybody's.

A process of its own (`engine_process`) speaks with Ray, since whatever a node answers is unpickled
there, which is running a node's code, and since Ray ends its drivers when its head is gone. It has
neither the orchestrator's keys nor its prompts in its memory; what it says is checked and believed
as little as any address: the handshake shows who is there. On each node a keeper, an actor of
Ray's, has one stage's worker run (`keeper`), in the way a supervisor does on this machine.
"""
