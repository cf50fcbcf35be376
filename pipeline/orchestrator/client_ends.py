"""The ends of a model at home: rows leave and rows come, and no token does.

Embedding, final norm and head are computed here. Whatever a request wants of its last row, a token,
a draw, logits, is made of it by the function that the last stage has for it, so that the text is
the same, bit for bit.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.codecs.base import ActivationCodec
from pipeline.codecs.gaussian_noise import GaussianNoise
from pipeline.dtypes import Array
from pipeline.engine.home_times import Stopwatch, Times
from pipeline.engine.step import Step
from pipeline.errors import InputError, MessageError
from pipeline.models.registry import ModelShard
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Result, Want
from pipeline.protocol.step_header import StepHeader
from pipeline.protocol.step_limits import CLEAR_SENTINEL
from pipeline.protocol.step_results import StepResult, step_result
from pipeline.stage.last_stage import step_results
from transport.tensor_frames import Tensor


class ClientEnds:
    """Embedding, final norm and head, held here; no token leaves, and no stage makes one."""

    are_remote = False

    def __init__(
        self, shard: ModelShard, codec: ActivationCodec, noise: GaussianNoise | None = None
    ) -> None:
        """`shard` has both ends and no layers; `codec` is how rows travel to the first stage.

        `noise`: what they get before they do.
        """
        self._shard = shard
        self._codec = codec
        self._noise = noise
        self._watch = Stopwatch()
        self._head = _TimedHead(shard, self._watch)

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._shard.config.vocab_size

    def begin(self, step: Step) -> tuple[StepHeader, tuple[Tensor, ...]]:
        """Embedded rows. Raises InputError for ids that the model has no row for."""
        header = _in_rows(step.header)
        if not header.carries_tokens:
            return header, (CLEAR_SENTINEL,)
        vocab_size = self.vocab_size
        if max((*step.token_ids, *step.asked.token_ids)) >= vocab_size:
            raise InputError(
                f"a token id is outside the vocabulary of {vocab_size}; "
                "does the tokenizer belong to this model?"
            )
        self._watch.start()
        rows = self._shard.embed(np.array(step.token_ids, np.int64), header.segments)
        (rows,) = self._shard.kernels.to_host(rows)
        self._watch.lap("embed")
        if self._noise is not None:
            places = zip(step.requests, header.segments, strict=True)
            rows = self._noise.apply(
                rows, [(request, each.position, each.num_tokens) for request, each in places]
            )
            self._watch.lap("noise")
        encoded = self._codec.encode(rows)
        self._watch.lap("cloak")
        return header, encoded

    def end(self, step: Step, header: StepHeader, tensors: Sequence[Tensor]) -> StepResult:
        """Norm and head of the rows that came, and of those whatever the step wants.

        Raises MessageError for an answer to something else.
        """
        # Attack: an answer to another step, or to this one asked otherwise, would have rows of
        # before taken for this token's.
        if header._replace(timings=()) != _in_rows(step.header):
            raise MessageError(
                f"the last stage answered something else than step {step.header.step}"
            )
        asked = step.header._replace(timings=header.timings)
        if not asked.carries_tokens:
            return step_result(asked, tensors)
        self._watch.start()
        rows = step_result(header, tensors).hidden
        self._watch.lap("uncloak")
        if rows is None:  # of a prompt that goes on
            return StepResult(asked, [])
        returned = [
            Segment(slot, position + num_tokens - want.rows, want.rows)
            for (slot, position, num_tokens), want in zip(asked.segments, asked.wants, strict=True)
        ]
        results = step_results(
            self._head,
            asked._replace(segments=tuple(returned)),
            step.asked,
            self._shard.kernels.to_device(rows),
        )
        result = step_result(asked, results)
        self._watch.lap("sample")
        return result

    def take_times(self) -> Times:
        """What has been spent since the last time."""
        return self._watch.take()


class _TimedHead:
    """A shard's norm and head, on a stopwatch that runs for what is made of their results."""

    def __init__(self, shard: ModelShard, watch: Stopwatch) -> None:
        self.config, self.kernels = shard.config, shard.kernels
        self._shard = shard
        self._watch = watch

    def results(self, hidden: Array) -> tuple[Array, Array]:
        """Most likely tokens and logits."""
        self._watch.lap("sample")
        found = self._shard.results(hidden)
        self._watch.lap("head")
        return found


def _in_rows(header: StepHeader) -> StepHeader:
    """The header of a step that wants rows for whatever it wants of them."""
    wants = [Want(Result.HIDDEN, want.rows) if want else Want.NOTHING for want in header.wants]
    return header._replace(wants=tuple(wants))
