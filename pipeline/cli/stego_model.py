"""What hidden messages are bound to of a model and its stages, and the service over these."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.agreement.manifest import Manifest
from pipeline.engine.generation import Engine
from pipeline.engine.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer
from pipeline.errors import InputError
from pipeline.gguf.model_files import read_model_file
from pipeline.kernels.kernel_selection import choose_kernels
from pipeline.models.config import load_config, read_config
from pipeline.orchestrator.open_pipeline import Pipeline
from pipeline.protocol.messages import Ready
from pipeline.protocol.tide_window import TideWindow
from pipeline.stego.fingerprint import Fingerprint
from pipeline.stego.retokenise import CoverTokenizer
from pipeline.stego.service import StegoService

# What travels as it was computed; every other way of activations rounds them.
_EXACT_WIRE = "F32"


def model_fingerprint(
    manifest: Manifest, model_dir: Path, ready: Sequence[Ready] = ()
) -> Fingerprint:
    """What messages are bound to of a model, and of its stages where they have told.

    Raises InputError.
    """
    hashes = {digest for stage in manifest.stages for digest in stage.weight_hashes}
    spec = manifest.activation_spec
    # With embedding and head at home rows travel before the first layers, too.
    cuts = [
        stage.layer_start
        for stage in manifest.stages
        if manifest.has_client_ends or stage.layer_start
    ]
    is_exact = spec.dtype == _EXACT_WIRE or not cuts
    planned = [stage.precision for stage in manifest.stages]
    return Fingerprint(
        config=manifest.config_hash or _sha256(read_config(model_dir)),
        tokenizer=_sha256(_read(model_dir / "tokenizer.json")),
        weights=_sha256("".join(sorted(hashes)).encode()) if hashes else None,
        precision=_joined([each.precision for each in ready] or planned),
        kernels=_joined([each.kernels for each in ready]),
        wire="exact" if is_exact else f"{spec.dtype} before layers {', '.join(map(str, cuts))}",
    )


def local_fingerprint(manifest: Manifest, model_dir: Path) -> Fingerprint:
    """What can be known before there are stages: that they compute as this machine would.

    Raises InputError.
    """
    config = load_config(model_dir, manifest.config_hash)
    kernels = choose_kernels("auto", config.head_dim)
    return model_fingerprint(manifest, model_dir).model_copy(update={"kernels": kernels.name})


def new_service(
    engine: Engine,
    tokenizer: Tokenizer,
    manifest: Manifest,
    model_dir: Path,
    pipeline: Pipeline,
    window: TideWindow | None,
) -> StegoService:
    """A service over an engine that runs on these stages. Raises InputError."""
    model = model_fingerprint(manifest, model_dir, pipeline.ready)
    kept = None if window is None else f"{window.size} positions with {window.num_sinks} sinks"
    return StegoService(
        engine,
        CoverTokenizer(tokenizer),
        model.model_copy(update={"window": kept}),
        is_row_exact=pipeline.is_row_exact,
    )


def _joined(values: Sequence[str | None]) -> str | None:
    """What stages say, each thing once; None unless all do."""
    said = [value for value in values if value is not None]
    return ", ".join(dict.fromkeys(said)) if said and len(said) == len(values) else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return read_model_file(path, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
