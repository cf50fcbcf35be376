"""Keys and values as a stranger may hold them, and attention over them.

Home encodes, K' = P([K, n, 0] R) and V' = P([V, m] S), asks with q' = [q, 0, u] R^-T, and reads
the first columns of (o' S^-1). The holder computes ordinary attention and has no key. Noise n, m
and u is fresh for each row and query. Products never see it: u meets the zeros, and n those of the
query; R spreads both over every column of what is held and asked. So it is removed exactly, and by
nobody in particular.

Decoys are real rows of other text among the first ones. The holder's softmax is over them too;
home knows them, computes their own share of the sum, and takes it out: with a the log of the whole
sum of exponentials and b that of the decoys, o = (o_all - e^(b-a) o_decoys) / (1 - e^(b-a)).
"""

import hashlib
import hmac
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    ArrayDType,
    HostArray,
    from_floats,
    to_floats,
)
from pipeline.scx.errors import AnswerRefused, CacheRefused, ScxError
from pipeline.scx.keys import KeyGenerator, Order
from pipeline.scx.products import encode_head
from pipeline.scx.rows import Answer, EncodedRows, Receipt, attend

_DIGEST_BYTES = 32
# What decoys leave of the sum of exponentials, at least: below, rounding is all that is left.
_LEAST_SHARE = 1e-9
_FLOAT64: ArrayDType = np.dtype(np.float64)
_DTYPES = (FLOAT32, _FLOAT64, FLOAT16, BFLOAT16)


class LayerCodec:
    """Encodes, and reads, one layer of one sequence. It keeps nothing but what it was made with.

    decoys: keys and values [KV heads, `keys.redundant_num`, head_dim] of rows of other text, as the
    model computes them. dtype: that of the cache, of float64, float32, float16 and bfloat16 (as
    bits, see pipeline.dtypes). model: what tells this model from others. Raises ScxError.
    """

    def __init__(
        self,
        keys: KeyGenerator,
        layer: int,
        num_kv_heads: int,
        sequence: int = 0,
        *,
        decoys: tuple[HostArray, HostArray] | None = None,
        dtype: npt.DTypeLike = FLOAT32,
        model: bytes = b"",
    ) -> None:
        self._keys = keys
        self._layer = layer
        self._heads = num_kv_heads
        self._sequence = sequence
        self._dtype = np.dtype(dtype)
        if self._dtype not in _DTYPES:
            raise ScxError(f"a cache has no numbers of type {self._dtype}")
        # What is computed with; halves are only stored.
        self._real = _FLOAT64 if self._dtype == _FLOAT64 else FLOAT32
        self.num_decoys = keys.redundant_num
        self._model_digest = hashlib.blake2b(model, digest_size=_DIGEST_BYTES).digest()
        keys.segment(layer, num_kv_heads, sequence)
        shape = (num_kv_heads, keys.redundant_num, keys.head_dim)
        if keys.redundant_num and decoys is None:
            raise ScxError(f"there are no rows of other text for redundant_num={shape[1]}")
        none = np.zeros(shape, self._real)
        given = decoys or (none, none)
        if any(rows.shape != shape for rows in given):
            raise ScxError(f"decoys are keys and values of shape {shape}")
        self._decoys = given

    # Encoding

    def encode(self, keys: HostArray, values: HostArray) -> EncodedRows:
        """[KV heads, rows, head_dim], after RoPE -> the rows and the decoys in an order of P.

        Raises ScxError for other shapes, and where there is no row.
        """
        self._check_shapes(keys, values)
        orders = self._orders(self.num_decoys + keys.shape[1])
        if not self.num_decoys:
            return self._mixed(keys, values, 0, 0, orders)
        both = self._held_decoys.followed_by(self._mixed(keys, values, self.num_decoys, 0))
        if orders is None:
            return both
        order = np.stack(orders)[:, :, None]
        return EncodedRows(
            np.take_along_axis(both.keys, order, 1), np.take_along_axis(both.values, order, 1)
        )

    def append(self, keys: HostArray, values: HostArray, receipt: Receipt) -> EncodedRows:
        """[KV heads, rows, head_dim], after RoPE -> rows to hold after those of the receipt.

        Several are in an order of P, and have one key. Raises ScxError for other shapes, and where
        there is no row.
        """
        self._check_shapes(keys, values)
        before, count = receipt.num_rows, keys.shape[1]
        orders = self._orders(count, before) if count > 1 else None
        return self._mixed(keys, values, self.num_decoys + before, before, orders)

    def decode(self, rows: EncodedRows, receipt: Receipt) -> tuple[HostArray, HostArray]:
        """Keys and values [KV heads, rows, head_dim] in their own order, without decoys.

        Raises CacheRefused for anything but what these keys encoded.
        """
        self.check(rows, receipt)
        keys, values = (
            np.concatenate([
                self._numbers(encoded[:, start:stop]) @ self._matrix(kind, segment).mT
                for segment, start, stop in self._segments(receipt)
            ], 1)
            for kind, encoded in (("keys", rows.keys), ("values", rows.values))
        )  # fmt: skip
        together = [(0, self._orders(self.num_decoys + receipt.num_first))] + [
            (self.num_decoys + start, self._orders(count, start)) for start, count in receipt.chunks
        ]
        for start, orders in together:
            for head, order in enumerate(orders or ()):
                for ordered in (keys[head, start:], values[head, start:]):
                    ordered[order] = ordered[: len(order)].copy()
        real = np.s_[:, self.num_decoys :, : self._keys.head_dim]
        return keys[real], values[real]

    @cached_property
    def turns(self) -> tuple[HostArray, HostArray, HostArray] | None:
        """R, S and its transpose, where these are all that a lone row takes; else None."""
        keys = self._keys
        is_more = self.num_decoys or keys.noise_dim or keys.one_time or not keys.dense
        if is_more or self._dtype != FLOAT32:
            return None
        first = self._first_matrices
        back = np.ascontiguousarray(first["values"].mT)
        return first["keys"], first["values"], back

    # What home keeps

    def seal(self, rows: EncodedRows, num_padding: int = 0) -> Receipt:
        """The receipt of what `encode` returned, of so many more tokens that were masked."""
        num_first = rows.num_rows - self.num_decoys
        return Receipt(
            num_first, num_first, self._link(b"first %d" % num_padding, rows), num_padding
        )

    def extend(self, receipt: Receipt, more: EncodedRows) -> Receipt:
        """The receipt of a cache that has been followed by what `append` returned."""
        before, count = receipt.num_rows, more.num_rows
        digest = self._link(receipt.digest, more)
        chunks = (*receipt.chunks, (before, count)) if count > 1 else receipt.chunks
        return Receipt(receipt.num_first, before + count, digest, receipt.num_padding, chunks)

    def check(self, rows: EncodedRows, receipt: Receipt) -> None:
        """Raise CacheRefused unless these are the rows that the receipt is of."""
        num_rows = receipt.num_rows + self.num_decoys
        try:
            steps = receipt.steps
        except ValueError as error:
            raise CacheRefused(self._layer, str(error)) from error
        if rows.num_rows != num_rows:
            said = f"{rows.num_rows} rows, not {num_rows}"
            raise CacheRefused(self._layer, said)
        shape = (self._heads, num_rows, self._keys.width)
        if rows.keys.shape != shape or {rows.keys.dtype, rows.values.dtype} != {self._dtype}:
            raise CacheRefused(self._layer, "another shape or type of number")
        split = receipt.num_first + self.num_decoys
        found = self.seal(rows.part(0, split), receipt.num_padding)
        for start, count in steps:
            found = self.extend(found, rows.part(self.num_decoys + start, count))
        if not hmac.compare_digest(found.digest, receipt.digest):
            raise CacheRefused(self._layer)

    # Decoding

    def segments(self, receipt: Receipt) -> list[tuple[int, int]]:
        """Where each segment of the cache starts and ends: what its holder has to know of it."""
        return [(start, stop) for _, start, stop in self._segments(receipt)]

    def ask(self, queries: HostArray, receipt: Receipt) -> HostArray:
        """Queries [KV heads, queries, head_dim], after RoPE and scaled -> one for each segment.

        Shape: [KV heads, queries, segments, width]. With decoys they are of float64, so that the
        holder's sums are: what decoys put into them is then taken out without a trace.
        """
        segments = self._segments(receipt)
        real = _FLOAT64 if self.num_decoys else self._real
        if len(segments) == 1 and not self._keys.noise_dim:
            asked = queries.astype(real, copy=False) @ self._matrix("keys", segments[0][0])
            return asked[:, :, None]
        shape = (*queries.shape[:2], len(segments), self._keys.width)
        asked = np.zeros(shape, real)
        asked[..., : self._keys.head_dim] = queries[:, :, None]
        if noise_dim := self._keys.noise_dim:
            where = (self._layer, self._sequence, receipt.num_rows)
            noise = self._keys.laplace(b"u", (*shape[:3], noise_dim), *where)
            asked[..., -noise_dim:] = noise
        for at, (segment, _, _) in enumerate(segments):
            asked[:, :, at] = asked[:, :, at] @ self._matrix("keys", segment)
        return asked

    def read(self, answer: Answer, asked: HostArray, receipt: Receipt) -> HostArray:
        """The attention's output [KV heads, queries, head_dim]. Raises as `share`."""
        return self.share(answer, asked, receipt)[0]

    def share(
        self, answer: Answer, asked: HostArray, receipt: Receipt
    ) -> tuple[HostArray, HostArray]:
        """The output over these rows alone, and the log of their sum of exponentials.

        [KV heads, queries, head_dim] and [KV heads, queries], to be joined with what other rows
        give; in float64 where anything is taken out of it. Raises AnswerRefused for what no honest
        holder of the cache answers, and ScxError where the decoys leave nothing of it.
        """
        if answer.outputs.shape != asked.shape or answer.log_sums.shape != asked.shape[:3]:
            raise AnswerRefused("an answer about an encoded cache has another shape")
        if not (np.isfinite(answer.outputs).all() and np.isfinite(answer.log_sums).all()):
            raise AnswerRefused("an answer about an encoded cache is not finite")
        if asked.shape[2] == 1 and not self.num_decoys:
            decoded: HostArray = answer.outputs[:, :, 0] @ self._matrix("values", 0).mT
            return decoded[..., : self._keys.head_dim], answer.log_sums[:, :, 0]
        outputs, log_sums = answer.outputs.astype(_FLOAT64), answer.log_sums.astype(_FLOAT64)
        if self.num_decoys:
            self._remove_decoys(outputs[:, :, 0], log_sums[:, :, 0], asked[:, :, :1])
        top = log_sums.max(2, keepdims=True)
        shares = np.exp(log_sums - top)
        sums = shares.sum(2, keepdims=True)
        outputs *= (shares / sums)[..., None]
        decoded = np.zeros((*asked.shape[:2], self._keys.width))
        for at, (segment, _, _) in enumerate(self._segments(receipt)):
            decoded += outputs[:, :, at] @ self._matrix("values", segment).mT
        return decoded[..., : self._keys.head_dim], (top + np.log(sums))[..., 0]

    def _remove_decoys(self, outputs: HostArray, log_sums: HostArray, asked: HostArray) -> None:
        """In place: the answer that a cache without decoys would have given."""
        held = self._held_decoys
        decoys = EncodedRows(self._numbers(held.keys), self._numbers(held.values))
        theirs = attend(asked, decoys, [(0, self.num_decoys)])
        share = np.exp(theirs.log_sums[:, :, 0] - log_sums)
        if (share > 1 + _LEAST_SHARE).any():
            raise AnswerRefused("an answer about an encoded cache leaves out some of its rows")
        left = 1 - share
        if (left < _LEAST_SHARE).any():
            raise ScxError("decoy rows take all of the attention; take rows of other text")
        outputs -= share[..., None] * theirs.outputs[:, :, 0]
        outputs /= left[..., None]
        log_sums += np.log(left)

    @cached_property
    def _held_decoys(self) -> EncodedRows:
        """As the holder has them, bit for bit: with their noise, and rounded."""
        return self._mixed(*self._decoys, 0, 0)

    # Keys, and products with them

    def _segments(self, receipt: Receipt) -> list[tuple[int, int, int]]:
        """Each segment's number in its keys, its first row and the one after its last."""
        if not self._keys.one_time:
            return [(0, 0, self.num_decoys + receipt.num_rows)]
        num_decoys = self.num_decoys
        return [(0, 0, num_decoys + receipt.num_first)] + [
            (row, num_decoys + row, num_decoys + row + count) for row, count in receipt.steps
        ]

    def _matrix(self, kind: str, segment: int) -> HostArray:
        if segment == 0 or not self._keys.one_time:
            return self._first_matrices[kind]
        derived = self._keys.segment(self._layer, self._heads, self._sequence, segment)
        matrix: HostArray = getattr(derived, kind).astype(self._real)
        return matrix

    @cached_property
    def _first_matrices(self) -> dict[str, HostArray]:
        first = self._keys.segment(self._layer, self._heads, self._sequence)
        return {
            "keys": first.keys.astype(self._real),
            "values": first.values.astype(self._real),
        }

    def _orders(self, num_rows: int, *first_row: int) -> list[Order] | None:
        """For each head, which row comes at each place; none where rows stay in order.

        first_row: of rows that come later.
        """
        if not self._keys.permute:
            return None
        return [
            self._keys.permutation(num_rows, self._layer, head, self._sequence, *first_row)
            for head in range(self._heads)
        ]

    def _mixed(
        self,
        keys: HostArray,
        values: HostArray,
        first_row: int,
        segment: int,
        orders: list[Order] | None = None,
    ) -> EncodedRows:
        """Encoded rows, of which the first is row `first_row` of the cache, decoys counted."""
        if noise_dim := self._keys.noise_dim:
            shape = (keys.shape[1], self._heads, 3 * noise_dim)
            where = (self._layer, self._sequence, first_row)
            noise = self._keys.laplace(b"n", shape, *where).astype(self._real).transpose(1, 0, 2)
            nothing = np.zeros_like(noise[..., :noise_dim])
            keys = np.concatenate((keys, noise[..., :noise_dim], nothing), 2)
            values = np.concatenate((values, noise[..., noise_dim:]), 2)
        return EncodedRows(
            self._products("keys", keys, segment, orders),
            self._products("values", values, segment, orders),
        )

    def _products(
        self, kind: str, rows: HostArray, segment: int, orders: list[Order] | None
    ) -> HostArray:
        rows = rows.astype(self._real, copy=False)
        matrices = self._matrix(kind, segment) if self._keys.dense else None
        encoded: HostArray
        if matrices is not None and orders is None:
            encoded = rows @ matrices
        else:
            encoded = np.empty(rows.shape, self._real)
            for head in range(self._heads):
                encode_head(
                    rows[head],
                    None if matrices is None else matrices[head],
                    None if orders is None else orders[head],
                    encoded[head],
                )
        return encoded if self._dtype == self._real else from_floats(encoded, self._dtype)

    def _numbers(self, rows: HostArray) -> HostArray:
        return rows if self._dtype == self._real else to_floats(rows)

    @cached_property
    def _digest_key(self) -> bytes:
        return self._keys.stream(b"digest", _DIGEST_BYTES, self._layer, self._sequence)

    def _link(self, before: bytes, rows: EncodedRows) -> bytes:
        digest = hashlib.blake2b(before, key=self._digest_key, digest_size=_DIGEST_BYTES)
        shape = (*rows.keys.shape, self.num_decoys)
        digest.update(b"%d %d %d %d " % shape + self._dtype.str.encode() + self._model_digest)
        for array in (rows.keys, rows.values):
            digest.update(np.ascontiguousarray(array).data)
        return digest.digest()

    def _check_shapes(self, keys: HostArray, values: HostArray) -> None:
        shape = (self._heads, keys.shape[1] if keys.ndim == 3 else 0, self._keys.head_dim)
        if keys.shape != shape or values.shape != shape or not shape[1]:
            raise ScxError(
                f"keys and values are [{shape[0]} KV heads, rows, {shape[2]}], at least one row, "
                f"not {list(keys.shape)} and {list(values.shape)}"
            )
