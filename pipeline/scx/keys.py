"""Keys of an encoded cache, all derived from one seed and none stored.

Every key is ChaCha20's stream under its own HKDF key, whose `info` names what it is for: session,
epoch, layer, sequence of the batch and segment. Whoever has the seed derives it again, in another
object, process or machine, for any number of rows: `seq_len` is a hint and enters no key.

A segment is what is encoded under one key: the rows there were at first, and with one-time keys
each row that came later. P permutes what is encoded at once. A row that is appended alone is known
by its arrival, which no permutation hides; a new epoch encodes, and permutes, everything anew.
"""

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.scx.errors import ScxError

Doubles = npt.NDArray[np.float64]
Order = npt.NDArray[np.int64]

_DOMAIN = b"veilpipe scx/1"
_KEY_BYTES = 32
# A ChaCha20 key is used for one stream only, so its nonce may be fixed.
_NONCE = bytes(16)
_MAX_SEED = 1 << 256
# A column of noise for so many of a head: the noise of a row has that rank.
_COLUMNS_A_NOISE = 8
_CACHED_SEGMENTS = 1024


@dataclass(frozen=True, slots=True)
class SegmentKeys:
    """R for queries and keys, S for values, one of each a KV head.

    Float64 [heads, width, width]. They are orthogonal, drawn from all rotations and reflections:
    R^-T = R and S^-1 = S^T, and nothing is lost to their condition.
    """

    keys: Doubles = field(repr=False)
    values: Doubles = field(repr=False)


class KeyGenerator:
    """The keys of one session's cache in one epoch.

    hidden_dim: the model's width. qk_hidden_dim: that of one head. redundant_num: decoy rows a
    sequence. alp: the scale of the Laplace noise on every row and query; True for 1. batch_size:
    how many sequences may have keys. decode_start_layers, decode_end_layers: layers that whoever
    holds the seed keeps for himself. seed: 32 random bytes, drawn where none is given; a number or
    a shorter seed is for experiments, since it can be guessed. permute, dense: whether there are P,
    and R and S; noise needs the latter. one_time: each decode step's row gets its own R and S.

    Raises ScxError for arguments that make no keys.
    """

    def __init__(
        self,
        seq_len: int,
        hidden_dim: int,
        qk_hidden_dim: int,
        redundant_num: int = 0,
        alp: float = False,
        batch_size: int = 1,
        decode_start_layers: Iterable[int] | None = None,
        decode_end_layers: Iterable[int] | None = None,
        seed: bytes | int | None = None,
        session: bytes = b"",
        epoch: int = 0,
        *,
        permute: bool = True,
        dense: bool = True,
        one_time: bool = False,
    ) -> None:
        self.seq_len = _whole("seq_len", seq_len)
        self.hidden_dim = _whole("hidden_dim", hidden_dim, 1)
        self.head_dim = self.qk_hidden_dim = _whole("qk_hidden_dim", qk_hidden_dim, 1)
        if self.head_dim > self.hidden_dim:
            raise ScxError(
                f"qk_hidden_dim is {qk_hidden_dim}, one head's width; hidden_dim is {hidden_dim}"
            )
        self.redundant_num = _whole("redundant_num", redundant_num)
        self.alp = _scale(alp)
        self.batch_size = _whole("batch_size", batch_size, 1)
        self.decode_start_layers = _layers("decode_start_layers", decode_start_layers)
        self.decode_end_layers = _layers("decode_end_layers", decode_end_layers)
        self.seed = _seed(seed)
        if not isinstance(session, bytes):
            raise ScxError(f"session is bytes, not {type(session).__name__}")
        self.session = session
        self.epoch = _whole("epoch", epoch)
        self.permute = bool(permute)
        self.dense = bool(dense) or self.alp > 0
        self.one_time = bool(one_time)
        # Columns of noise on rows, and as many on queries: they never meet in a product.
        self.noise_dim = -(-self.head_dim // _COLUMNS_A_NOISE) if self.alp else 0
        self._segment = lru_cache(_CACHED_SEGMENTS)(self._derive_segment)

    def __repr__(self) -> str:
        return f"KeyGenerator(head_dim={self.head_dim}, epoch={self.epoch})"

    @property
    def width(self) -> int:
        """How wide an encoded row of a head is."""
        return self.head_dim + 2 * self.noise_dim

    @property
    def home_layers(self) -> frozenset[int]:
        """The layers that are kept by whoever holds the seed."""
        return self.decode_start_layers | self.decode_end_layers

    def stream(self, purpose: bytes, num_bytes: int, *indices: int) -> bytes:
        """What the seed says of this purpose and these indices.

        The settings are part of it: keys of differing ones have nothing in common.
        """
        how = (self.permute, self.dense, self.one_time)
        numbers = (self.head_dim, self.noise_dim, self.redundant_num, *how, self.epoch, *indices)
        info = b"|".join((
            _DOMAIN, purpose, b"%d" % len(self.session), self.session, self.alp.hex().encode(),
            *(b"%d" % number for number in numbers),
        ))  # fmt: skip
        key = HKDF(SHA256(), _KEY_BYTES, None, info).derive(self.seed)
        return Cipher(ChaCha20(key, _NONCE), None).encryptor().update(bytes(num_bytes))

    def permutation(self, num_rows: int, *indices: int) -> Order:
        """One of all orders of so many rows."""
        words = np.frombuffer(self.stream(b"rows", 8 * num_rows, num_rows, *indices), "<u8")
        # Each with its number in the last bits: that sorts in half of an `argsort`'s time.
        last = np.uint64((1 << num_rows.bit_length()) - 1)
        numbered = words & ~last
        numbered |= np.arange(num_rows, dtype=np.uint64)
        numbered.sort()
        numbered &= last
        return numbered.view(np.int64)

    def laplace(self, purpose: bytes, shape: tuple[int, ...], *indices: int) -> Doubles:
        """Noise of scale `alp`."""
        centred = self._uniform(purpose, math.prod(shape), *indices).reshape(shape) - 0.5
        noise: Doubles = -self.alp * np.sign(centred) * np.log1p(-2 * np.abs(centred))
        return noise

    def segment(self, layer: int, num_heads: int, sequence: int, segment: int = 0) -> SegmentKeys:
        """R and S of each KV head. Raises ScxError for a sequence beyond the batch."""
        if not 0 <= sequence < self.batch_size:
            raise ScxError(
                f"there are keys for {self.batch_size} sequences (batch_size), none for sequence "
                f"{sequence}"
            )
        return self._segment(layer, num_heads, sequence, segment if self.one_time else 0)

    def _derive_segment(
        self, layer: int, num_heads: int, sequence: int, segment: int
    ) -> SegmentKeys:
        shape = (num_heads, self.width, self.width)
        if not self.dense:
            identity = np.broadcast_to(np.eye(self.width), shape)
            return SegmentKeys(identity, identity)
        both = [
            np.stack(
                [
                    self._orthogonal(purpose, layer, head, sequence, segment)
                    for head in range(num_heads)
                ]
            )
            for purpose in (b"R", b"S")
        ]
        return SegmentKeys(*both)

    def _orthogonal(self, purpose: bytes, *indices: int) -> Doubles:
        size = self.width * self.width
        uniform = self._uniform(purpose, 2 * size, *indices)
        radius = np.sqrt(-2 * np.log(uniform[:size]))
        normal = radius * np.cos(2 * math.pi * uniform[size:])
        q, r = np.linalg.qr(normal.reshape(self.width, self.width))
        # Without the signs a library's choice of them would be part of the key.
        matrix: Doubles = (q * np.where(np.diagonal(r) < 0, -1.0, 1.0)).astype(np.float64)
        return matrix

    def _uniform(self, purpose: bytes, count: int, *indices: int) -> Doubles:
        """Strictly between 0 and 1."""
        words = np.frombuffer(self.stream(purpose, 8 * count, *indices), "<u8") >> np.uint64(12)
        uniform: Doubles = ((words + 0.5) * 2.0**-52).astype(np.float64)
        return uniform


SCXKeyGenerator = KeyGenerator


def _whole(name: str, value: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ScxError(f"{name} is a whole number of at least {least}, not {value!r}")
    return int(value)


def _scale(alp: float) -> float:
    if not isinstance(alp, int | float | np.floating) or not 0 <= alp < math.inf:
        raise ScxError(f"alp is the scale of noise: True, or a finite number from 0, not {alp!r}")
    return float(alp)


def _layers(name: str, layers: Iterable[int] | None) -> frozenset[int]:
    try:
        return frozenset(_whole(name, layer) for layer in (() if layers is None else layers))
    except TypeError:
        raise ScxError(f"{name} are numbers of layers, not {layers!r}") from None


def _seed(seed: bytes | int | None) -> bytes:
    if seed is None:
        return secrets.token_bytes(_KEY_BYTES)
    if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < _MAX_SEED:
        return seed.to_bytes(_KEY_BYTES, "big")
    if isinstance(seed, bytes) and seed:
        return seed
    raise ScxError("seed is bytes, or a number from 0 that fits 32 of them")
