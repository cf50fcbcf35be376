"""What a stage does with one step. Sans-IO: a header and tensors in, tensors out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from pipeline.dtypes import Floats, HostArray
from pipeline.errors import MessageError
from pipeline.kernels.base import DecodeStep, FramePlace, Rows, Serve
from pipeline.kernels.session_memory import KeptSlots
from pipeline.models.registry import ModelShard
from pipeline.protocol.batch import Batch
from pipeline.protocol.last_stage_inputs import NOTHING_ASKED, Asked, asked_from_wire
from pipeline.protocol.result_kinds import Result, Want
from pipeline.protocol.step_header import StepHeader, StepKind, decode_step
from pipeline.protocol.step_limits import (
    CLEAR_SENTINEL,
    SessionLimits,
    num_row_tensors,
    token_ids_from_wire,
    token_specs,
)
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.last_stage import Scored, results_of, step_results
from pipeline.stage.replay_merging import CatchUp
from transport.tensor_frames import Tensor


class StageCore:
    """A shard of layers with the KV state of one session, and with `log` what it has sent on.

    Keys, values and log take `max_bytes` at most, and the log gives way; None: all that there are
    addresses for. Replayed steps are computed within `while_replaying`.
    """

    def __init__(
        self,
        shard: ModelShard,
        limits: SessionLimits,
        log: ActivationLog | None = None,
        max_bytes: int | None = None,
        while_replaying: Callable[[], AbstractContextManager[None]] = nullcontext,
        kept: KeptSlots | None = None,
    ) -> None:
        """`kept`: slots that outlive this process, and may hold what another has left: `go_on`."""
        self.shard = shard
        self._while_replaying = while_replaying
        self.limits = limits
        shape = limits.num_slots, limits.max_seq_len, limits.window
        self.cache = shard.new_cache(*shape) if kept is None else shard.new_cache(*shape, kept)
        self.log = log
        self._row_bytes = self.cache.range_bytes(1)
        self._max_bytes = max_bytes
        if max_bytes is not None and self._row_bytes:
            self.cache.ledger.max_total = max_bytes // self._row_bytes
        # Whether results leave here, with or without a head to make them of.
        self.is_last = shard.layer_end == shard.config.num_layers
        self._codec = limits.codec
        self._num_row_tensors = num_row_tensors(limits, is_first=shard.is_first)
        self._catch_up = CatchUp(limits.max_step_tokens)
        # What the last step sends on, until it is kept: its number, its segments, its rows.
        self._unkept: tuple[int, Batch, Floats | bytearray | memoryview] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that the session's slots may take."""
        num_bytes = self.cache.num_bytes + (self.log.num_bytes if self.log is not None else 0)
        return num_bytes if self._max_bytes is None else min(num_bytes, self._max_bytes)

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values slots may hold together."""
        most = self.limits.num_slots * self.limits.max_rows
        shared = self.cache.ledger.max_total
        return most if shared is None else min(most, shared)

    @property
    def keeps_activations(self) -> bool:
        """Whether all that slots hold can be sent on once more."""
        return self.log is not None and self.log.is_whole(self.cache.lengths)

    @property
    def decodes_in_place(self) -> bool:
        """Whether `decode` takes rows as they travel, and no replayed step is still put off."""
        return self._codec.is_plain_f32 and self.shard.has_decode_steps and not self._catch_up

    def is_decoding(self, header: StepHeader) -> bool:
        """Whether it is a step for `decode`, which has no rows to return from before the head."""
        return (
            self.shard.decodes(len(header.segments))
            and header.kind is StepKind.STEP
            and header.num_tokens == len(header.segments)
            and not (self.shard.is_last and Want.HIDDEN in header.wants)
        )

    def decode(self, step: int, segments: Batch, rows: Rows) -> tuple[bytearray, Floats | None]:
        """Run a step of one token for each segment from rows to rows: see `Shard.decode`."""
        self.keep()
        outputs, logits = self.shard.decode(rows, segments, self.cache)
        if self.log is not None and logits is None:
            self._unkept = (step, segments, outputs)
        return outputs, logits

    def server(self, count: int, form: FramePlace, out: FramePlace) -> Serve:
        """What runs steps of `count` segments from frame to frame, as one has been run already.

        See `DecodeStep.server`. Once they are on their way, each has to be `served`.
        """
        step: DecodeStep = self.cache.recordings[count]
        return step.server(form, out, self.cache, all_rows=self.limits.has_client_ends)

    def served(self, step: int, segments: Batch, rows: memoryview) -> None:
        """Count what has been computed from frame to frame, and keep what has been laid out."""
        self.cache.reserve(segments)
        self.cache.advance(segments)
        if self.cache.kept is not None:
            self.cache.kept.note_away()
        if self.log is not None and not self.is_last:
            self._unkept = (step, segments, rows)
            self.keep()

    def take(
        self, header: StepHeader, tensors: Sequence[Tensor]
    ) -> list[tuple[StepHeader, tuple[Tensor, ...]]]:
        """Run one step, or put it off: what has been computed, each step with its outputs.

        Replayed steps wait for each other where that changes nothing, until any other step comes:
        a few large steps take a fraction of the time. Raises MessageError as `step` does.
        """
        is_put_off = header.kind is StepKind.REPLAY and self.shard.is_row_exact
        done: list[tuple[StepHeader, tuple[Tensor, ...]]] = []
        if self._catch_up and not (is_put_off and self._catch_up.has_room(header)):
            done = self._caught_up()
        if is_put_off:
            self._catch_up.add(header, self._inputs(tensors), self.cache.lengths)
        else:
            done.append((header, self.step(header, tensors)))
        return done

    def keep(self) -> None:
        """Put what the last step sends on into the log: best once it is on its way."""
        unkept, self._unkept = self._unkept, None
        if unkept is not None and self.log is not None:
            step, segments, rows = unkept
            hidden = np.frombuffer(rows, "<f4").reshape(-1, self._codec.hidden_dim)
            self.log.append(step, segments, hidden)
            self._fit_log()

    def _fit_log(self) -> None:
        """Forget what has been sent on where keys and values need its memory."""
        if self.log is None or self._max_bytes is None:
            return
        if self.cache.num_rows * self._row_bytes + self.log.num_kept_bytes > self._max_bytes:
            self.log.clear()

    def step(self, header: StepHeader, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run one step.

        Shapes: first stage U32 [tokens], others what the codec's `specs` say, and what is asked
        of the last stage, which the others pass on behind their rows; the last one returns
        `expected_results`, or nothing for a replay. Raises MessageError when the step does not fit
        the KV state, or what is asked this model.
        """
        self.keep()
        if header.kind is StepKind.TRUNCATE:
            for slot, position, _ in header.segments:
                self._truncate(slot, position)
            return (CLEAR_SENTINEL,)
        if header.kind is StepKind.COPY:
            self._copy(header)
            return (CLEAR_SENTINEL,)
        tensors, behind = tensors[: self._num_row_tensors], tensors[self._num_row_tensors :]
        asked = NOTHING_ASKED
        if behind and self.shard.is_last:
            asked = asked_from_wire(header.wants, behind, self.shard.config.vocab_size)
        if self.is_decoding(header):
            outputs = self._decode(header, tensors, asked)
        else:
            hidden = self.shard.forward(self._inputs(tensors), header.segments, self.cache)
            if self.is_last:
                is_replay = header.kind is StepKind.REPLAY
                return () if is_replay else step_results(self.shard, header, asked, hidden)
            (hidden,) = self.shard.kernels.to_host(hidden)
            if self.log is not None:
                self._unkept = (header.step, header.segments, hidden)
            outputs = self._codec.encode(hidden)
        return outputs if self.is_last else (*outputs, *behind)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Go back to `lengths` tokens per slot. Raises MessageError when a slot holds fewer."""
        if len(lengths) != self.limits.num_slots:
            raise MessageError(
                f"rewind names {len(lengths)} slots, there are {self.limits.num_slots}"
            )
        self.keep()
        self._catch_up = CatchUp(self.limits.max_step_tokens)
        for slot, length in enumerate(lengths):
            self._truncate(slot, length)

    @property
    def name(self) -> bytes | None:
        """Of what its slots hold, where that outlives this process."""
        return None if self.cache.kept is None else self.cache.kept.name

    def go_on(self, lengths: Sequence[int] | None) -> None:
        """Keep so many tokens per slot of what was found; None: begin with empty slots.

        Slots are where another process was between two steps of theirs, as after any loss: what it
        had begun and not counted is overwritten, or zeroed. Raises MessageError where they hold
        fewer, which cannot be of the name they were asked for by.
        """
        if self.cache.kept is not None and (noted := self.cache.kept.noted):
            held = self.cache.ledger.held
            segments = decode_step(noted).segments
            self.cache.advance([each for each in segments if held[each.slot] == each.position])
            self.cache.kept.note_away()
        try:
            self.rewind(lengths or [0] * self.limits.num_slots)
        except MessageError:
            self.release()
            raise

    def computed(self, header: memoryview) -> None:
        """Note a step that is computed, and `served` once what it gives is on its way."""
        if self.cache.kept is not None:
            self.cache.kept.note(header)

    def replay(self, until: int) -> Iterator[tuple[StepHeader, tuple[Tensor, ...]]]:
        """What was sent on before, once more. Raises MessageError when it has not been kept."""
        self.keep()
        if self.log is None or not self.keeps_activations:
            raise MessageError("this stage does not keep the activations that it is to replay")
        for header, hidden in self.log.replay(until, self.limits.max_step_tokens):
            yield header, self._codec.encode(hidden)

    def release(self) -> None:
        """Zero the session's keys, values, activations and logits; give memory of its own back."""
        self._catch_up = CatchUp(self.limits.max_step_tokens)
        self._unkept = None
        self.cache.release()
        self.shard.wipe()
        if self.log is not None:
            self.log.release()

    def _truncate(self, slot: int, length: int) -> None:
        self.cache.truncate(slot, length)
        if self.log is not None:
            self.log.truncate(slot, length)

    def _copy(self, header: StepHeader) -> None:
        for source, target in zip(header.segments[::2], header.segments[1::2], strict=True):
            self.cache.copy(source.slot, target.slot, target.num_tokens)
            if self.log is not None:
                self.log.copy(header.step, source.slot, target.slot, target.num_tokens)
        self._fit_log()

    def _caught_up(self) -> list[tuple[StepHeader, tuple[Tensor, ...]]]:
        """Compute all that has been put off, in one go."""
        self.keep()
        steps, self._catch_up = self._catch_up, CatchUp(self.limits.max_step_tokens)
        segments, inputs = steps.merged()
        done = []
        with self._while_replaying():
            hidden = self.shard.forward(inputs, segments, self.cache)
            (outputs,) = self.shard.kernels.to_host(hidden)
        for header, rows in steps.split(outputs):
            if self.log is not None:
                self.log.append(header.step, header.segments, rows)
                self._fit_log()
            done.append((header, () if self.is_last else self._codec.encode(rows)))
        return done

    def _decode(
        self, header: StepHeader, tensors: Sequence[Tensor], asked: Asked
    ) -> tuple[Tensor, ...]:
        """A step of one token each, from the wire to the wire where that carries float32."""
        is_plain = self._codec.is_plain_f32
        rows = tensors[0].data
        if not (self.shard.is_first or is_plain):
            rows = self._codec.decode(tensors).data.cast("B")
        try:
            outputs, logits = self.decode(header.step, header.segments, rows)
        except ValueError:
            self._inputs(tensors)  # says what is wrong with token ids
            raise
        if logits is not None:
            return _decoded(header, asked, outputs, logits)
        if self.is_last:
            return self._returned(header, outputs)
        if is_plain:
            (spec,) = self._codec.specs(len(header.segments))
            return (Tensor(spec, memoryview(outputs)),)
        hidden = np.frombuffer(outputs, "<f4").reshape(-1, self._codec.hidden_dim)
        return self._codec.encode(hidden)

    def _returned(self, header: StepHeader, rows: bytearray) -> tuple[Tensor, ...]:
        """The results of a decode step without a head: F32 [n, hidden], of those that want them."""
        hidden = np.frombuffer(rows, "<f4").reshape(-1, self._codec.hidden_dim)
        wanted = hidden[[want.result is Result.HIDDEN for want in header.wants]]
        return results_of(header, NOTHING_ASKED, (), self.shard.config.vocab_size, wanted)

    def _inputs(self, tensors: Sequence[Tensor]) -> HostArray:
        if not self.shard.is_first:
            return self._codec.decode(tensors)
        token_ids = token_ids_from_wire(tensors[0])
        vocab_size = self.shard.config.vocab_size
        if max(token_ids.tolist(), default=0) >= vocab_size:
            raise MessageError(
                f"a token id is outside the vocabulary of {vocab_size}; "
                "does the tokenizer belong to this model?"
            )
        return token_ids.astype(np.int64)


def _decoded(
    header: StepHeader, asked: Asked, tokens: bytearray, logits: Floats
) -> tuple[Tensor, ...]:
    """The results of a decode step: U32 [n] and F32 [n, vocab], of which each wants its part."""
    if all(want == Want.TOKEN for want in header.wants):
        return (Tensor(token_specs(len(header.wants))[0], memoryview(tokens)),)
    scored = [
        Scored(token_id, None if want.result is Result.TOKEN else row)
        for want, token_id, row in zip(
            header.wants, np.frombuffer(tokens, "<u4").tolist(), logits, strict=True
        )
        if want.result is not Result.NOTHING
    ]
    return results_of(header, asked, scored, logits.shape[1], _NO_ROWS)


_NO_ROWS = np.empty((0, 0), np.float32)
