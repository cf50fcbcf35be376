"""The model that a manifest is for, as the directory has it that a command was given."""

from pathlib import Path

from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError
from pipeline.models.config import ModelConfig, load_config


def agreed_config(manifest: Manifest, model_dir: Path) -> ModelConfig:
    """A model directory's configuration. Raises ModelError, InputError unless it is the manifest's.

    For those manifests too that pin no hash of it.
    """
    config = load_config(model_dir, manifest.config_hash)
    spec = manifest.activation_spec
    if spec.max_seq_len > config.max_positions:
        raise InputError(
            f"the manifest allows {spec.max_seq_len} positions, the model of {model_dir} was made "
            f"for {config.max_positions}"
        )
    expected = (manifest.total_layers, spec.hidden_dim)
    if (config.num_layers, config.hidden_dim) != expected:
        raise InputError(
            f"{model_dir} has {config.num_layers} layers of width {config.hidden_dim}, "
            f"the manifest says {expected[0]} of width {expected[1]}"
        )
    return config
