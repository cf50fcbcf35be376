"""What of a family's layers touches the residual stream, for those who rotate it."""

from collections.abc import Mapping

from transport.frozen import frozen


@frozen
class ResidualStream:
    """Names below a layer's prefix: everything else of a layer sees no row of the stream.

    Between a norm and the linears behind it there may be nothing, and nothing between a writer and
    the stream. Families in which there is have no such description, and are not rotated.
    """

    # Each norm, with the linears that read what it gives.
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    # Whether norms centre rows and shift them (LayerNorm); else they only scale (RMSNorm).
    is_centred: bool = False
    # Whether linears of layers are stored [in, out].
    is_in_out: bool = False
    # Learned positions, added to embedded rows.
    positions: str | None = None
