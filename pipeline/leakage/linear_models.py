"""The model of somebody whose linears an untrusted worker computes, with that worker beside it."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from pipeline.leakage.modes import Mode
from pipeline.leakage.public_model import PublicModel
from pipeline.models.config import load_config
from pipeline.models.ends import NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.offload.linear_parts import MaskedParts, MixedParts
from pipeline.offload.mask_file import write_masks
from pipeline.offload.masks import Masks, open_masks
from pipeline.offload.ring import Words
from pipeline.offload.ring_linear import HeldLinear, HeldParts

WORD = 8


class LinearHost:
    """An honest worker, which keeps what it has been sent as long as somebody wants to see it."""

    def __init__(self, linears: Sequence[HeldLinear]) -> None:
        self.linears = linears
        self.seen: list[Words] | None = None

    @classmethod
    def load(cls, model_dir: Path) -> "LinearHost":
        """With all weights of a model. Raises ModelError."""
        config, parts = load_config(model_dir), HeldParts()
        load_shard(
            model_dir, config, 0, config.num_layers,
            parts=parts, ends=NO_ENDS, expected_hashes=None,
        )  # fmt: skip
        return cls(parts.linears)

    @property
    def bytes_a_row(self) -> int:
        """What one row of a step moves, both ways."""
        return WORD * sum(each.num_in + each.num_out for each in self.linears)

    def multiply(self, index: int, rows: Words, num_out: int) -> Words:
        """Rows times the weights of a linear."""
        del num_out
        if self.seen is not None:
            self.seen.append(rows)
        return self.linears[index].product(rows)


class _Masked(MaskedParts):
    def __init__(self, masks: Masks, host: LinearHost) -> None:
        self.multiply = host.multiply  # type: ignore[method-assign]
        super().__init__(masks)


class _Mixed(MixedParts):
    def __init__(self, host: LinearHost) -> None:
        self.multiply = host.multiply  # type: ignore[method-assign]
        super().__init__()


@contextmanager
def opened_linear_model(
    mode: Mode, model_dir: Path, layers: Sequence[int], host: LinearHost, num_masks: int
) -> Iterator[PublicModel]:
    """The model by such a mode; with masks for so many rows, where there are any.

    Raises InputError.
    """
    if mode.holds == "mixed rows":
        yield PublicModel.load(model_dir, layers, parts=_Mixed(host))
        return
    with tempfile.TemporaryDirectory(prefix="veilpipe.") as name:
        path = Path(name, "masks")
        write_masks(path, host.linears, (), num_masks)
        with closing(open_masks(path)) as masks:
            yield PublicModel.load(model_dir, layers, parts=_Masked(masks, host))
