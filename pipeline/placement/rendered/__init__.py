"""Stages on machines that an engine of others hands out: a manifest comes in, its files go out.

The engine schedules, starts and stops, and is outside of what is trusted: nothing secret is in what
it is given. `placeable` says which manifests may be given away, `stage_needs` what is asked for;
`k8s` and `slurm` write what either takes. `README.md` tells how it is used.
"""
