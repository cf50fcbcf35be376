"""Manifests as templates: vsock addresses whose CIDs launching decides, which is CID 0 there."""

from collections.abc import Mapping

from pipeline.agreement.addresses import Address, StageEndpoint, VsockAddress
from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError
from transport.dial_and_listen import PARENT_CID, VSOCK_UNDECIDED


def with_cids(manifest: Manifest, cids: Mapping[int, int]) -> Manifest:
    """The manifest with the CIDs of started enclaves, by stage, at that stage's vsock addresses.

    What sends to CID 0 sends to its parent instance, for an enclave reaches nothing else.

    Raises InputError for a stage that there is not.
    """
    for stage_idx in cids:
        if stage_idx not in range(len(manifest.stages)):
            raise InputError(f"--cid {stage_idx}: the manifest has {len(manifest.stages)} stages")
    stages = tuple(
        stage.model_copy(
            update={
                "endpoint": stage.endpoint and _filled(stage.endpoint, cids.get(stage.stage_idx))
            }
        )
        for stage in manifest.stages
    )
    return manifest.model_copy(update={"stages": stages})


def require_cids(manifest: Manifest) -> None:
    """Raises InputError where what an orchestrator dials has no CID yet."""
    for stage in manifest.stages:
        if (addresses := stage.endpoint) is None:
            continue
        dialed = [addresses.control] if stage.stage_idx else [addresses.control, addresses.data_in]
        if any(map(_is_undecided, dialed)):
            raise InputError(
                f"the manifest does not say which CID stage {stage.stage_idx}'s enclave has; "
                f"give --cid {stage.stage_idx}=CID"
            )


def _filled(addresses: StageEndpoint, cid: int | None) -> StageEndpoint:
    own = {} if cid is None else {"control": cid, "data_in": cid}
    parents = {"data_out": PARENT_CID} if _is_undecided(addresses.data_out) else {}
    found = {name: (getattr(addresses, name), number) for name, number in (own | parents).items()}
    return addresses.model_copy(
        update={
            name: address.model_copy(update={"cid": number})
            for name, (address, number) in found.items()
            if isinstance(address, VsockAddress)
        }
    )


def _is_undecided(address: Address | None) -> bool:
    return isinstance(address, VsockAddress) and address.cid == VSOCK_UNDECIDED
