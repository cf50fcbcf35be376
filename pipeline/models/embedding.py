"""A stage's own embedding table, held where the head is another stage's."""

import torch

from pipeline.models.kernels import Kernels
from pipeline.models.quant import num_groups
from pipeline.models.sinks import Sink, weight_sinks


class Embedding:
    """Token id -> row, in the precision its tied head would have, so that splits agree bitwise."""

    def __init__(
        self, num_tokens: int, width: int, *, kernels: Kernels, precision: torch.dtype
    ) -> None:
        self.precision = precision
        self._kernels = kernels
        self.weight = torch.empty(num_tokens, width, dtype=precision)
        self._scales: torch.Tensor | None = None
        if precision is torch.int8:
            self._scales = torch.empty(num_tokens, num_groups(width), dtype=torch.bfloat16)

    def gather(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Rows of `ids` [n] into out [n, width]."""
        self._kernels.lookup(self.weight, ids, out, scales=self._scales)

    def put(self, first: int, outputs: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Rows first.. in this table's precision, int8 with their scales."""
        last = first + outputs.shape[0]
        self.weight[first:last] = outputs
        if self._scales is not None and scales is not None:
            self._scales[first:last] = scales

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.weight.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def sinks(self, name: str) -> dict[str, Sink]:
        """Sinks of the checkpoint tensor `name`."""
        return weight_sinks(name, self, 0, *self.weight.shape)
