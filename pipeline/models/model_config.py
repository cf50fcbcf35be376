"""What every family's configuration has, and what is read of every config.json.

Field names are config.json's keys.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from pipeline.errors import ModelError
from pipeline.kernels.base import HeadShape
from pipeline.models.rope_config import Rope
from pipeline.weights.packings.choice import Finder, read_quantization
from transport.frozen import frozen

# Well above every published model, and so low that no product of them leaves 63 bits: a config.json
# of absurd sizes is refused by name, not by whatever fails first inside.
MAX_LAYERS = 4096
NumLayers = Annotated[int, Field(gt=0, le=MAX_LAYERS)]
Width = Annotated[int, Field(gt=0, le=1 << 20)]
Inner = Annotated[int, Field(gt=0, le=1 << 22)]
Heads = Annotated[int, Field(gt=0, le=1 << 14)]
HeadDim = Annotated[int, Field(gt=0, le=1 << 14)]
NumExperts = Annotated[int, Field(gt=0, le=1 << 12)]
Vocabulary = Annotated[int, Field(gt=0, le=1 << 24)]
Epsilon = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

Fields = dict[str, Any]


@frozen
class LayerShape:
    """How one layer attends: its heads, and how positions turn them, if they do."""

    heads: HeadShape
    rope: Rope | None = None


@frozen(kw_only=True)
class ModelConfig:
    """What every family has in common."""

    architecture: str
    num_layers: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    intermediate_size: int
    norm_eps: float
    tie_word_embeddings: bool
    # Fingerprint of the secret rotation in the weights, if any (planning/rotated_weights.py).
    rotation: str | None = None
    # How other programs packed the weights in files, if they did.
    packing: Finder | None = None
    # The linears that int4 leaves in int8, as their weights' files come in more bits; sorted.
    int8_linears: tuple[str, ...] = ()
    # What embedded rows are multiplied by.
    embedding_scale: float = 1.0
    # Whether each head has a score that takes its share of attention and gives nothing.
    has_sinks: bool = False

    def shape(self, layer: int) -> LayerShape:
        """That of a layer of the model."""
        del layer  # here they are all alike
        return LayerShape(HeadShape(self.num_heads, self.num_kv_heads, self.head_dim))

    @property
    def window(self) -> int | None:
        """So many positions are all that some layer looks back; None: each to the start."""
        found = {self.shape(layer).heads.window for layer in range(self.num_layers)} - {0}
        return min(found, default=None)


class JsonFields(BaseModel):
    """What is read of every config.json, and refused."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, protected_namespaces=(), defer_build=True
    )

    vocab_size: Vocabulary
    eos_token_id: int | list[int] | None = None
    quantization_config: Annotated[Any, AfterValidator(read_quantization)] = None
    residual_rotation: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None


def eos_token_ids_of(*values: object) -> tuple[int, ...]:
    """Every end token that any of these fields names."""
    found: set[int] = set()
    for value in values:
        candidates = value if isinstance(value, list) else [value]
        found.update(each for each in candidates if type(each) is int and each >= 0)
    return tuple(sorted(found))


def head_dim_of(hidden: int, num_heads: int, names: str) -> int:
    """Dimensions of a head where all of them make a row. Raises ModelError, with the `names`."""
    if hidden % num_heads:
        raise ModelError(f"config.json: {names} is {hidden}/{num_heads}, not a whole number")
    return hidden // num_heads


def shown(value: object) -> str:
    """A value of a file, short enough to be told of."""
    return repr(value)[:80]
