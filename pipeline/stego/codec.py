"""What carries uniform bytes in choices among weighted tokens, and reads them back: the seam.

A codec is asked once per token, with the token's distribution. Writer and reader of the same bytes
go in lockstep: after the same choices among the same weights both know equally much.
"""

from typing import Protocol

from pipeline.stego.token_weights import TokenWeights


class Reader(Protocol):
    """What somebody who sees the choices knows of the bytes so far."""

    @property
    def is_certain(self) -> bool:
        """Whether only one value of the bytes is left; from then on `payload` is that one."""
        ...

    @property
    def num_bits(self) -> float:
        """How many bits of the bytes are known, 0 to all of them."""
        ...

    def observe(self, weights: TokenWeights, index: int) -> None:
        """Learn from one choice: the `index`-th of the tokens. Raises StegoError for none of them.

        Once certain it learns no more, and no choice is refused.
        """
        ...

    def payload(self) -> bytes:
        """The bytes. Raises StegoError before they are certain."""
        ...


class Writer(Reader, Protocol):
    """Picks tokens so that a reader learns the bytes."""

    def choose(self, weights: TokenWeights) -> int:
        """The next token's index, distributed as its weights; observed by the same call."""
        ...


class StegoCodec(Protocol):
    """A way to carry bytes. `key`, 32 bytes, seeds what both ends have to draw alike.

    Tokens fall by their weights if the key is secret and no other message's, or the bytes are
    uniformly random; a header that is to be read without a secret can have any key.
    """

    name: str

    def writer(self, payload: bytes, key: bytes) -> Writer:
        """For these bytes."""
        ...

    def reader(self, num_bytes: int, key: bytes) -> Reader:
        """For so many bytes."""
        ...
