"""A checkpoint's weights with a secret rotation M in them: the same function of tokens to logits.

The residual stream h becomes h M^T. What writes to it is multiplied by M; what reads it undoes M,
and takes the gain g of the norm before it, which would not commute: W diag(g) M^T. A norm is left
with gains of one, and a root mean square is the same of a rotated row.

A LayerNorm also centres rows, and the mean of a rotated row means nothing. So all that writes to
the stream is centred here, C = I - 11^T/d: then rows have no mean, dividing by their root mean
square is all that is left of a LayerNorm, and the model is one with RMSNorms. The shift b goes to
the biases of the readers, W b; the head gets such a bias.

Source: SliceGPT (arXiv:2401.15024), section 3.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from pipeline.codecs.secret_rotation import Doubles, SecretRotation
from pipeline.dtypes import FLOAT32, ArrayDType, HostArray
from pipeline.models.ends import Names
from pipeline.models.residual import ResidualStream

Tensors = Mapping[str, HostArray]
# Rows are rotated in pieces of about so many bytes of float64, so that they stay in the cache.
PIECE_BYTES = 1 << 20


class RotatedWeights:
    """The tensors of any part of a model, rotated in float64 and rounded once, to `dtype`.

    What is given are all tensors of the layers and of the ends that are there, in floats; what
    comes out are those of the rotated model's part. A head that is tied to the embedding becomes
    one of its own.
    """

    def __init__(
        self,
        names: Names,
        stream: ResidualStream,
        rotation: SecretRotation,
        dtype: ArrayDType = FLOAT32,
    ) -> None:
        self._names = names
        self._stream = stream
        self._rotation = rotation
        self._dtype = dtype

    def layer(self, tensors: Tensors, index: int) -> dict[str, HostArray]:
        """Those of one layer; what sees no row of the stream as it is."""
        prefix = f"{self._names.layers}.{index}."
        found = dict(self._touching(tensors, prefix))
        taken = {*found, *(f"{prefix}{norm}.bias" for norm in self._stream.readers)}
        for name, tensor in tensors.items():
            if name.startswith(prefix) and name not in taken:
                found[name] = tensor.astype(self._dtype)
        return found

    def _touching(self, tensors: Tensors, prefix: str) -> Iterator[tuple[str, HostArray]]:
        """Those of a layer that read and write the stream."""
        is_in_out = self._stream.is_in_out
        for norm, linears in self._stream.readers.items():
            yield from self._readers(
                tensors, prefix + norm, [prefix + name for name in linears], is_in_out=is_in_out
            )
        for name in self._stream.writers:
            weight = tensors[f"{prefix}{name}.weight"]
            written = self._written(weight if is_in_out else weight.T)  # [in, hidden]
            yield f"{prefix}{name}.weight", written if is_in_out else written.T
            bias = tensors.get(f"{prefix}{name}.bias")
            if bias is not None:
                yield f"{prefix}{name}.bias", self._written(bias[None])[0]

    def ends(self, tensors: Tensors) -> Iterator[tuple[str, HostArray]]:
        """Embedding, final norm and head."""
        names = self._names
        embedding = f"{names.embedding}.weight"
        head = {f"{names.head}.weight": tensors[embedding]}
        yield from self._readers(head | dict(tensors), names.norm, [names.head], is_in_out=False)
        for name in (embedding, self._stream.positions):
            if name is not None:
                yield name, self._written(tensors[name])

    def _readers(
        self, tensors: Tensors, norm: str, linears: list[str], *, is_in_out: bool
    ) -> Iterator[tuple[str, HostArray]]:
        """A norm that only scales by one over the root mean square, and the linears behind it."""
        gain = tensors[f"{norm}.weight"].astype(np.float64)
        yield f"{norm}.weight", np.ones(len(gain), self._dtype)
        for name in linears:
            weight = tensors[f"{name}.weight"]
            outputs = weight.T if is_in_out else weight  # [out, hidden]
            bias = tensors.get(f"{name}.bias")
            if self._stream.is_centred:
                shift = outputs @ tensors[f"{norm}.bias"].astype(np.float64)
                bias = shift if bias is None else bias + shift
            if bias is not None:
                yield f"{name}.bias", bias.astype(self._dtype)
            rotated = self._rotated(outputs, gain)
            yield f"{name}.weight", rotated.T if is_in_out else rotated

    def _written(self, rows: HostArray) -> HostArray:
        """Rows [n, hidden] as they come into the stream."""
        return self._rotated(rows, None, is_centred=self._stream.is_centred)

    def _rotated(
        self, rows: HostArray, gain: Doubles | None, *, is_centred: bool = False
    ) -> HostArray:
        out: HostArray = np.empty(rows.shape, self._dtype)
        piece = max(1, PIECE_BYTES // (8 * rows.shape[1]))
        for first in range(0, len(rows), piece):
            doubles: npt.NDArray[np.float64] = rows[first : first + piece].astype(np.float64)
            if gain is not None:
                doubles *= gain
            if is_centred:
                doubles -= doubles.mean(axis=1, keepdims=True)
            out[first : first + piece] = self._rotation.apply(doubles)
        return out
