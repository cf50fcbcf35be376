"""A stage's own embedding table, held where the head is another stage's."""

from pipeline.dtypes import BFLOAT16, PRECISIONS, Array, HostArray, Precision
from pipeline.kernels.base import Kernels
from pipeline.weights.quantization import num_groups
from pipeline.weights.tensor_sinks import Sink, weight_sinks


class Embedding:
    """Token id -> row, in the precision its tied head would have, so that splits agree bitwise."""

    def __init__(
        self, num_tokens: int, width: int, *, kernels: Kernels, precision: Precision
    ) -> None:
        self.precision: Precision = precision
        self._kernels = kernels
        self.weight = kernels.weights(num_tokens, width, dtype=PRECISIONS[precision])
        self._scales: Array | None = None
        if precision == "int8":
            self._scales = kernels.weights(num_tokens, num_groups(width), dtype=BFLOAT16)

    def gather(self, ids: Array, out: Array) -> None:
        """Rows of `ids` [n] into out [n, width]."""
        self._kernels.lookup(self.weight, ids, out, scales=self._scales)

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Rows first.. as a file holds them, int8 with their scales."""
        assert first_in == 0, "rows of an embedding come whole"
        if self._scales is not None and scales is None:
            outputs, scales = self._kernels.quantise(outputs)
        last = first + len(outputs)
        self._kernels.fill(self.weight[first:last], outputs)
        if self._scales is not None and scales is not None:
            self._kernels.fill(self._scales[first:last], scales)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        held: int = self.weight.nbytes + (0 if self._scales is None else self._scales.nbytes)
        return held

    def sinks(self, name: str) -> dict[str, Sink]:
        """Sinks of the checkpoint tensor `name`."""
        return weight_sinks(name, self, 0, *self.weight.shape)
