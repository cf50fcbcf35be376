"""One layer of an encoded cache, for a batch: what its holder has, and what he computes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pipeline.dtypes import HostArray
from pipeline.scx.rows import Answer, EncodedRows, Receipt
from pipeline.scx.tensors import stacked


@dataclass(frozen=True, slots=True)
class EncodedLayer:
    """One layer of all sequences, and home's receipt of each sequence's.

    Shapes: keys and values [sequences, KV heads, rows, width].
    """

    keys: torch.Tensor = field(repr=False)
    values: torch.Tensor = field(repr=False)
    receipts: tuple[Receipt, ...]

    def to(self, device: torch.device) -> "EncodedLayer":
        """The same on a device."""
        return EncodedLayer(self.keys.to(device), self.values.to(device), self.receipts)

    def first_row(self, receipt: Receipt) -> int:
        """The row at which a sequence starts: all end together, and one begins at the first."""
        return max(each.num_rows for each in self.receipts) - receipt.num_rows

    def stacked(self, more: Sequence[EncodedRows]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of each sequence as keys and values like these."""
        return (
            stacked([rows.keys for rows in more], self.keys),
            stacked([rows.values for rows in more], self.keys),
        )

    def followed_by(
        self, more: Sequence[EncodedRows], receipts: tuple[Receipt, ...]
    ) -> "EncodedLayer":
        """With a row more of each sequence; this one stays as it is."""
        keys, values = self.stacked(more)
        return EncodedLayer(
            torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2), receipts
        )

    def attend(
        self, at: int, first: int, asked: HostArray, segments: Sequence[tuple[int, int]]
    ) -> Answer:
        """`rows.attend` where sequence `at` lies, from `first` on, in any type of number."""
        keys, values = self.keys[at, :, first:], self.values[at, :, first:]
        queries = torch.as_tensor(asked, device=keys.device)
        outputs = torch.empty_like(queries)
        log_sums = torch.empty(asked.shape[:3], dtype=torch.float64, device=keys.device)
        for part, (start, stop) in enumerate(segments):
            scores = queries[:, :, part] @ keys[:, start:stop].to(queries.dtype).mT
            top = scores.amax(-1, keepdim=True)
            weights = (scores - top).exp()
            sums = weights.sum(-1, keepdim=True)
            outputs[:, :, part] = weights @ values[:, start:stop].to(queries.dtype) / sums
            log_sums[:, :, part] = (top.double() + sums.double().log())[..., 0]
        return Answer(outputs.cpu().numpy(), log_sums.cpu().numpy())
