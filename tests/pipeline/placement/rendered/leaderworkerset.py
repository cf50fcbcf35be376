"""What the LeaderWorkerSet's API of version v1 takes, as its reference documentation says.

Written by hand: no package has the definition. Pod templates, claims and metadata are the core
API's, and left to its own schemas.
"""

import jsonschema

_ANYTHING = {"type": "object"}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER_OR_SHARE = {"anyOf": [_COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}


def _of(properties, *required):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _one_of(*names):
    return {"type": "string", "enum": list(names)}


_ROLLOUT = _of(
    {
        "type": _one_of("RollingUpdate"),
        "rollingUpdateConfiguration": _of(
            {"partition": _COUNT, "maxUnavailable": _NUMBER_OR_SHARE, "maxSurge": _NUMBER_OR_SHARE}
        ),
    },
    "type",
)
_TEMPLATE = _of(
    {
        "leaderTemplate": _ANYTHING,
        "workerTemplate": _ANYTHING,
        "size": {"type": "integer", "minimum": 1},
        "restartPolicy": _one_of(
            "Default", "None", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart"
        ),
        "subGroupPolicy": _of(
            {
                "subGroupPolicyType": _one_of("LeaderWorker", "LeaderExcluded"),
                "subGroupSize": {"type": "integer", "minimum": 1},
            }
        ),
        "volumeClaimTemplates": {"type": "array", "items": _ANYTHING},
        "persistentVolumeClaimRetentionPolicy": _of(
            {"whenDeleted": _one_of("Retain", "Delete"), "whenScaled": _one_of("Retain", "Delete")}
        ),
    },
    "workerTemplate",
)
SCHEMA = _of(
    {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
        "kind": {"const": "LeaderWorkerSet"},
        "metadata": _ANYTHING,
        "spec": _of(
            {
                "replicas": _COUNT,
                "leaderWorkerTemplate": _TEMPLATE,
                "rolloutStrategy": _ROLLOUT,
                "startupPolicy": _one_of("LeaderCreated", "LeaderReady"),
                "networkConfig": _of(
                    {"subdomainPolicy": _one_of("Shared", "UniquePerReplica")}, "subdomainPolicy"
                ),
            },
            "leaderWorkerTemplate",
        ),
    },
    "apiVersion", "kind", "metadata", "spec",
)  # fmt: skip


def templates(lws):
    """The pod templates of a set."""
    found = lws["spec"]["leaderWorkerTemplate"]
    return [found[name] for name in ("leaderTemplate", "workerTemplate") if name in found]


def validate(lws):
    """Raises jsonschema.ValidationError."""
    jsonschema.Draft202012Validator(SCHEMA).validate(lws)
