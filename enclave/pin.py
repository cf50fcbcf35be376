"""An image's measurements in a manifest, from which the user's side knows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enclave.build import write_atomically
from enclave.eif import PCR_BYTES
from enclave.errors import BuildError


def pin(manifest: Path, stage: int, pcrs: Mapping[int, bytes]) -> None:
    """Set `expected_measurements` of one stage, everything else as it was. Raises: BuildError."""
    document = _read(manifest)
    _stage(manifest, document, stage)["expected_measurements"] = {
        str(index): value.hex() for index, value in sorted(pcrs.items())
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_atomically(manifest, [text.encode()])


def pinned(manifest: Path, stage: int) -> dict[int, bytes]:
    """Return the measurements one stage must show. Raises: BuildError when there are none."""
    values = _stage(manifest, _read(manifest), stage).get("expected_measurements")
    if not isinstance(values, dict) or not values:
        raise BuildError(f"{manifest} pins no measurement for stage {stage}")
    pcrs = {}
    for index, value in values.items():
        try:
            pcrs[int(index)] = bytes.fromhex(value)
        except (ValueError, TypeError):
            raise BuildError(f"{manifest}: PCR {index!r} of stage {stage} is not hex") from None
        if len(pcrs[int(index)]) != PCR_BYTES:
            raise BuildError(f"{manifest}: PCR {index} of stage {stage} is not {PCR_BYTES} bytes")
    return pcrs


def _read(manifest: Path) -> object:
    try:
        document: object = json.loads(manifest.read_bytes())
    except ValueError as error:
        raise BuildError(f"{manifest} is not JSON: {error}") from error
    return document


def _stage(manifest: Path, document: object, stage: int) -> dict[str, Any]:
    stages = document.get("stages") if isinstance(document, dict) else None
    if not isinstance(stages, list) or not all(isinstance(each, dict) for each in stages):
        raise BuildError(f"{manifest} has no list of stages")
    chosen = [each for each in stages if each.get("stage_idx") == stage]
    if len(chosen) != 1:
        raise BuildError(f"{manifest} has {len(chosen)} stages of index {stage}, not one")
    found: dict[str, Any] = chosen[0]
    return found
