"""What a mode costs: in the model's predictions, and in time."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter

import numpy as np

from pipeline.dtypes import Floats
from pipeline.kernels.kv_cache import KVCache
from pipeline.leakage.cards import Utility
from pipeline.leakage.modes import Mode
from pipeline.leakage.next_tokens import log_softmax
from pipeline.leakage.observations import SEED, Text
from pipeline.leakage.public_model import PublicModel, forward
from pipeline.leakage.views import View
from pipeline.progress import Progress
from pipeline.protocol.batch import Segment

NUM_STAGES = 2
TIMED_TOKENS = 24


class ModePipeline:
    """The model in this process, its rows seen and restored wherever a mode has them travel."""

    def __init__(self, model: PublicModel, mode: Mode) -> None:
        self._model, self._mode = model, mode
        self._view: View = mode.make_view(model.config.hidden_dim, np.random.default_rng(SEED))
        num_layers = model.config.num_layers
        middle = min(model.cuts[1:], key=lambda cut: abs(cut - num_layers / NUM_STAGES))
        self._links = {0, middle, num_layers} if mode.is_client_split else {middle}
        if mode.holds != "rows":  # whoever asks for products keeps the rows
            self._links = set()

    def new_caches(self, num_positions: int) -> list[KVCache]:
        """For one text."""
        return [shard.new_cache(1, num_positions) for shard in self._model.shards]

    def logits(self, token_ids: Sequence[int], position: int, caches: Sequence[KVCache]) -> Floats:
        """Of each token, the first at `position`: [tokens, vocab]."""
        batch = (Segment(0, position, len(token_ids)),)
        rows = self._view.disturb(self._model.embed(token_ids, position))
        rows = self._travel(rows, 0)
        steps = zip(self._model.shards, caches, self._model.cuts[1:], strict=True)
        for shard, cache, cut in steps:
            rows = self._travel(forward(shard, rows, batch, cache), cut)
        return self._model.logits(rows)

    def _travel(self, rows: Floats, cut: int) -> Floats:
        if cut not in self._links:
            return rows
        held = self._mode.on_the_wire(self._view.observe(rows))
        return np.ascontiguousarray(self._view.restore(held))


def measure_utility(
    reference: ModePipeline, other: ModePipeline, texts: Sequence[Text], progress: Progress | None
) -> Utility:
    """A mode's logits beside the plain pipeline's, at every position of the texts."""

    def pairs() -> Iterator[tuple[Floats, Floats]]:
        for index, text in enumerate(texts):
            expected, found = (
                each.logits(text, 0, each.new_caches(len(text))) for each in (reference, other)
            )
            yield expected, found
            if progress is not None:
                progress(index + 1, len(texts))

    return compare_logits(pairs())


def compare_logits(pairs: Iterable[tuple[Floats, Floats]]) -> Utility:
    """Expected and found logits of texts, [positions, vocab] each: every position counts alike."""
    most = kl = 0.0
    same = count = 0
    for expected, found in pairs:
        most = max(most, float(np.abs(expected - found).max()))
        logs, found_logs = (log_softmax(each.astype(np.float64)) for each in (expected, found))
        kl += float((np.exp(logs) * (logs - found_logs)).sum())
        same += int((expected.argmax(axis=-1) == found.argmax(axis=-1)).sum())
        count += len(expected)
    return Utility(
        max_logit_difference=most, kl=max(kl / count, 0.0), greedy_agreement=same / count
    )


def tokens_per_second(pipelines: Sequence[ModePipeline], text: Text) -> list[float]:
    """Of greedy decoding in this process, the pipelines taking turns token by token."""
    num_tokens = min(TIMED_TOKENS, len(text))
    caches = [each.new_caches(len(text) + num_tokens) for each in pipelines]
    spent: list[list[float]] = [[] for _ in pipelines]
    last = [
        int(each.logits(text, 0, own)[-1].argmax())
        for each, own in zip(pipelines, caches, strict=True)
    ]
    for position, index in itertools.product(
        range(len(text), len(text) + num_tokens), range(len(pipelines))
    ):
        started = perf_counter()
        row = pipelines[index].logits(last[index : index + 1], position, caches[index])[-1]
        last[index] = int(row.argmax())
        spent[index].append(perf_counter() - started)
    # the median: other processes take this machine's cores now and then
    return [1 / float(np.median(each)) for each in spent]
