"""Which manifests an engine that somebody else runs can be given."""

from collections.abc import Iterator

from pipeline.agreement.addresses import Address
from pipeline.agreement.manifest import Manifest, StageSpec
from pipeline.agreement.trust_policy import require_pinned
from pipeline.errors import InputError, PolicyError
from transport.dial_and_listen import UnixEndpoint, VsockEndpoint


def check_placeable(manifest: Manifest) -> None:
    """Refuse what would not run on another's machines, or what nobody there could be held to.

    Raises PolicyError, InputError.
    """
    if manifest.part is not None or manifest.home_stages is not None:
        raise InputError(
            "the manifest has a worker or stages that belong at home; start those by hand"
        )
    for stage in manifest.stages:
        _check_known(manifest, stage)
        _check_addresses(stage)
    require_pinned(manifest)


def _check_known(manifest: Manifest, stage: StageSpec) -> None:
    """Attack: a node that runs something else, or computes with other weights, unnoticed."""
    idx = stage.stage_idx
    if not stage.weight_hashes or manifest.config_hash is None:
        raise PolicyError(
            f"the manifest is no plan: nothing pins the weights and config.json of stage {idx}; "
            "`pipeline-orch plan` writes one that does"
        )
    if not stage.machine_keys and not stage.expected_measurements:
        raise PolicyError(
            f"nothing in the manifest tells stage {idx} from another process: list its machine's "
            "key (`pipeline-orch keygen` there, then `plan --stage-key`), or pin its enclave's "
            "measurements (`python -m enclave pin`)"
        )


def _check_addresses(stage: StageSpec) -> None:
    is_enclave = bool(stage.expected_measurements)
    for name, address in _addresses(stage):
        endpoint = address.to_endpoint()
        if isinstance(endpoint, UnixEndpoint) or (
            isinstance(endpoint, VsockEndpoint) and not is_enclave
        ):
            raise InputError(
                f"stage {stage.stage_idx}'s {name} is {endpoint}, which no other machine reaches; "
                "plan it with TCP addresses"
            )


def _addresses(stage: StageSpec) -> Iterator[tuple[str, Address]]:
    endpoint = stage.endpoint
    if endpoint is None:
        return
    for name in ("control", "data_in", "data_out"):
        if (address := getattr(endpoint, name)) is not None:
            yield name, address
