"""The model that a server of rotated shards has: all of it, cut as shards are."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.codecs.secret_rotation import MIN_SECRET_BYTES, SecretRotation
from pipeline.errors import InputError
from pipeline.leakage.public_model import PublicModel
from pipeline.models.config import CONFIG_FILE, load_config
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.planning.part_weights import Part, Source, part_tensors, save_tensors
from pipeline.weights.checkpoint_index import SINGLE_FILE


def load_rotated(model_dir: Path, layers: Sequence[int], rng: np.random.Generator) -> PublicModel:
    """The model with a secret drawn from `rng` in its weights, as a stage would load it.

    It takes room for its weights in a temporary directory. Raises InputError, mostly ModelError.
    """
    config = load_config(model_dir)
    try:
        rotation = SecretRotation(rng.bytes(MIN_SECRET_BYTES), config.hidden_dim)
    except ValueError as error:
        raise InputError(f"{model_dir}: {error}") from error
    source = Source(model_dir, rotation)
    # as shards are cut: layers for the stages, the ends for the user
    parts = Part(range(config.num_layers), NO_ENDS, None), Part(range(0), BOTH_ENDS, None)
    try:
        with tempfile.TemporaryDirectory(prefix="veilpipe.") as name:
            directory = Path(name)
            cut = [part_tensors(source, config, part, None) for part in parts]
            save_tensors(cut[0] | cut[1], directory / SINGLE_FILE)
            (directory / CONFIG_FILE).write_bytes(source.config_json())
            return PublicModel.load(directory, layers)
    except OSError as error:
        raise InputError(f"cannot write rotated weights: {error.strerror}") from error
