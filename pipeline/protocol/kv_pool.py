"""What a stage's slots share of its memory: counted in tokens by whoever sends them."""

from typing import NamedTuple


class KVPool(NamedTuple):
    """Room for keys and values of so many tokens of all requests together, and its size."""

    num_tokens: int
    num_bytes: int

    def told(self, context: int, num_slots: int) -> str:
        """One line for the user; `context` is what one request may have."""
        return (
            f"context {context}, KV {self.num_bytes / 1e9:.1f} GB for {self.num_tokens:,} tokens "
            f"of up to {num_slots} requests"
        )
