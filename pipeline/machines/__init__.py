"""One's own machines, which know each other by their keys: pairing, measuring, parts, stages.

A machine offers itself by one line with a one-time secret; home joins it, and from then on each
knows the other's key. By links that bind both keys, and no manifest, home asks what a machine can
do, has machines measure how far apart they are, sends each its own part of a model, and names the
manifest of which it is to serve a stage. Every part lies under its hash. The stage itself is as on
any host, `pipeline.stage`. Both ends are here; commands call them.
"""
