"""What encoded keys and values cost, in predictions and in time, in one process."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import numpy as np

from pipeline.dtypes import Floats
from pipeline.kernels.kv_cache import KVCache
from pipeline.leakage.cards import Cost, Utility
from pipeline.leakage.modes import MODES, Mode
from pipeline.leakage.observations import Text
from pipeline.leakage.public_model import PublicModel, forward
from pipeline.leakage.utility import TIMED_TOKENS, ModePipeline, compare_logits
from pipeline.models.registry import ModelShard, load_shard
from pipeline.progress import Progress
from pipeline.protocol.batch import Segment
from pipeline.remote_parts.wire import Message
from pipeline.scx.attention_parts import AttentionParts
from pipeline.scx.attention_worker import AttentionMemory, AttentionWorker
from pipeline.scx.encoded_memory import SEED_BYTES, EncodedMemory, LocalLink
from transport.tensor_frames import Tensor

NUM_HOME_STAGES = 2


class CountingLink(LocalLink):
    """A link to a worker in this process: what would travel is counted."""

    def __init__(self) -> None:
        super().__init__(AttentionWorker(AttentionMemory(None)))
        self.num_asked = self.num_bytes = 0

    def ask(
        self,
        header: bytes,
        tensors: tuple[Tensor, ...] = (),
        meanwhile: Callable[[], None] | None = None,
    ) -> Message:
        """Ask at once."""
        answered, back = super().ask(header, tensors, meanwhile)
        self.num_asked += 1
        self.num_bytes += len(header) + len(answered)
        self.num_bytes += sum(each.spec.nbytes for each in (*tensors, *back))
        return answered, back


class EncodedModel:
    """All layers here, their keys and values encoded."""

    def __init__(self, model_dir: Path, model: PublicModel, mode: Mode, max_seq_len: int) -> None:
        self.link = CountingLink()
        parts: AttentionParts | EncodedMemory
        if mode.holds == "encoded rows":
            parts = AttentionParts(model.config)
            parts.attach(self.link, SimpleNamespace(num_slots=1, max_seq_len=max_seq_len))
        else:
            parts = EncodedMemory(model.config)
            parts.use(bytes(SEED_BYTES))
        self._shard: ModelShard = load_shard(
            model_dir, model.config, 0, model.config.num_layers, parts=parts, expected_hashes=None
        )
        self._cache: KVCache = self._shard.new_cache(1, max_seq_len)

    def logits(self, token_ids: Sequence[int], position: int) -> Floats:
        """Of each token, the first at `position`: [tokens, vocab]; at 0 another text begins."""
        if position == 0:
            self._cache.clear()
        batch = (Segment(0, position, len(token_ids)),)
        rows = forward(self._shard, np.array(token_ids, np.int64), batch, self._cache)
        (found,) = self._shard.kernels.to_host(
            self._shard.logits(self._shard.kernels.to_device(rows))
        )
        logits: Floats = found
        return logits


def measure_encoded(
    model_dir: Path,
    model: PublicModel,
    mode: Mode,
    texts: Sequence[Text],
    progress: Progress | None,
) -> tuple[Utility, Cost]:
    """Every text's second half decoded token by token, beside the plain model; and how fast."""
    encoded = EncodedModel(model_dir, model, mode, len(texts[0]) + TIMED_TOKENS)
    plain = ModePipeline(model, MODES["plain"])

    def pairs() -> Iterator[tuple[Floats, Floats]]:
        for index, text in enumerate(texts):
            caches = plain.new_caches(len(text))
            half = len(text) // 2
            parts = [text[:half], *((each,) for each in text[half:])]
            at, expected, found = 0, [], []
            for part in parts:
                expected.append(plain.logits(part, at, caches))
                found.append(encoded.logits(part, at))
                at += len(part)
            yield np.concatenate(expected), np.concatenate(found)
            if progress is not None:
                progress(index + 1, len(texts))

    utility = compare_logits(pairs())
    # Stages that keep rows themselves, and one at home at each end of them.
    num_bytes = mode.bytes_per_token(model.config.hidden_dim, NUM_HOME_STAGES + 1)
    return utility, _cost(encoded, plain, texts[0], num_bytes)


def _cost(encoded: EncodedModel, plain: ModePipeline, text: Text, own_bytes: int) -> Cost:
    caches = plain.new_caches(len(text) + TIMED_TOKENS)
    steps = (encoded.logits, lambda ids, at: plain.logits(ids, at, caches))
    last = [int(step(text, 0)[-1].argmax()) for step in steps]
    asked, num_bytes = encoded.link.num_asked, encoded.link.num_bytes
    spent: list[list[float]] = [[], []]
    places = range(len(text), len(text) + TIMED_TOKENS)
    for position, index in itertools.product(places, range(2)):
        started = perf_counter()
        last[index] = int(steps[index](last[index : index + 1], position)[-1].argmax())
        spent[index].append(perf_counter() - started)
    speed, plain_speed = (1 / float(np.median(each)) for each in spent)
    return Cost(
        tokens_per_second=speed,
        plain_tokens_per_second=plain_speed,
        bytes_per_token=(encoded.link.num_bytes - num_bytes) // TIMED_TOKENS or own_bytes,
        round_trips_per_token=(encoded.link.num_asked - asked) // TIMED_TOKENS or 1,
    )
