"""Stages as a Kubernetes cluster runs them: a manifest comes in, objects to apply go out.

The cluster schedules, starts and stops; it is outside of what is trusted. It is handed nothing
secret, and what it says of where a stage is counts for an address to dial: whoever answers there
shows the key or the measurements that the manifest has, or is refused. So objects name volumes,
secrets and keys, and hold none of what is in them. `rendering` puts them together of `workload`
(what runs), `pod`, `enclave_pod` and `network` (who reaches whom); `cluster` is what a user says.
"""
