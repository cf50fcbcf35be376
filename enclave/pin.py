"""Writing an image's measurements into a manifest, so that the user's side knows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from enclave.build import write_atomically
from enclave.errors import BuildError


def pin(manifest: Path, stage: int, pcrs: Mapping[int, bytes]) -> None:
    """Set `expected_measurements` of one stage, everything else as it was. Raises: BuildError."""
    try:
        document = json.loads(manifest.read_bytes())
    except ValueError as error:
        raise BuildError(f"{manifest} is not JSON: {error}") from error
    stages = document.get("stages") if isinstance(document, dict) else None
    if not isinstance(stages, list) or not all(isinstance(each, dict) for each in stages):
        raise BuildError(f"{manifest} has no list of stages")
    chosen = [each for each in stages if each.get("stage_idx") == stage]
    if len(chosen) != 1:
        raise BuildError(f"{manifest} has {len(chosen)} stages of index {stage}, not one")
    chosen[0]["expected_measurements"] = {
        str(index): value.hex() for index, value in sorted(pcrs.items())
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_atomically(manifest, [text.encode()])
