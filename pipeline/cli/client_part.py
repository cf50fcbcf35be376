"""The orchestrator's own part of a model, where the manifest's split is client."""

import os
from pathlib import Path

from pipeline.agreement.manifest import Manifest
from pipeline.cli.compute_options import WorkerOptions, agreed_precision
from pipeline.cli.progress import progress_bar
from pipeline.codecs.gaussian_noise import KEY_BYTES, GaussianNoise
from pipeline.errors import ModelError
from pipeline.files import is_file
from pipeline.gguf.model_files import is_gguf
from pipeline.kernels.runtime import set_num_threads
from pipeline.models.ends import BOTH_ENDS
from pipeline.models.older_client_part import client_weights
from pipeline.models.registry import load_shard
from pipeline.orchestrator.client_ends import ClientEnds
from pipeline.stage.model_config import agreed_config


def load_client_ends(manifest: Manifest, path: Path, options: WorkerOptions) -> ClientEnds:
    """Load embedding, norm and head from a directory, or from a file in the older layout.

    They are held against the manifest's hash. Of `options` those count that say how to compute.
    Raises ModelError, InputError.
    """
    client = manifest.client
    assert client is not None, "the manifest's split is client"
    precision = agreed_precision(options.dtype, client.precision, "the client's part")
    set_num_threads(options.threads or 1)
    weights = client_weights(path)
    try:
        with progress_bar("loading embedding and head") as progress:
            shard = load_shard(
                weights,
                agreed_config(manifest, _config_of(weights)),
                0,
                0,
                dtype=precision,
                kernels=options.kernels or "auto",
                device=options.device or "cpu",
                ends=BOTH_ENDS,
                expected_hashes=client.weight_hashes,
                pieces=manifest.weight_pieces,
                progress=progress,
            )
    except ModelError as error:
        raise ModelError(
            f"the client's part (--client-part, `pipeline-orch shard` writes it): {error}"
        ) from error
    noise = None
    if (dp := manifest.dp) is not None:
        width, key = manifest.activation_spec.hidden_dim, os.urandom(KEY_BYTES)
        noise = GaussianNoise(dp.sigma, dp.clip, width, key)
    return ClientEnds(shard, manifest.activation_spec.codec, noise)


def _config_of(weights: Path) -> Path:
    """What has the configuration of weights: they themselves, or their file's directory."""
    return weights.parent if is_file(weights) and not is_gguf(weights) else weights
