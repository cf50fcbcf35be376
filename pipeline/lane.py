"""The straight way through a stage, for steps of one token for each request.

Such a step comes with every token, and between two of them all of a shard's weights pass through
the processor's caches, so that each call of what lies between socket and kernels costs
microseconds: two hundred of them a tenth of a small model's token. Here they are a few dozen. The
bytes on the wire, the ciphers and the checks are the same; whatever is not plainly such a step is
left, as it came, to the ordinary way, which decides what it is.
"""

from collections.abc import Collection
from time import perf_counter_ns

from pipeline.errors import MessageError
from pipeline.messages import (
    DecodeHeaders,
    StageTiming,
    StepHeader,
    StepKind,
    Want,
    encode_step,
)
from pipeline.meter import StageMeter
from pipeline.models.batch import Segment
from pipeline.neighbours import DOWNSTREAM, UPSTREAM
from pipeline.stage import StageCore
from pipeline.steps import SessionLimits, activation_specs, token_specs
from transport.channel import SecureChannel
from transport.errors import MisuseError, TransportError
from transport.frames import DType, Frame, FrameForm, FrameKind, Tensor, TensorSpec

ANY = frozenset(int(want) for want in Want)
TOKEN = frozenset({int(Want.TOKEN)})


class Lane:
    """Between two data channels, for as long as they stand."""

    def __init__(
        self,
        core: StageCore,
        meter: StageMeter,
        upstream: SecureChannel,
        downstream: SecureChannel,
        stage_idx: int,
    ) -> None:
        self._core = core
        self._meter = meter
        self._upstream = upstream
        self._downstream = downstream
        self._stage_idx = stage_idx
        # By the bytes of a frame, which tell how many requests it is for.
        self._forms: dict[int, _Forms] = {}

    def learn(self, header: StepHeader) -> None:
        """From now on take such steps, if they can be taken, as one that has just been served."""
        count = len(header.segments)
        is_decoding = header.kind is StepKind.STEP and header.num_tokens == count
        if not (is_decoding and self._core.decodes_in_place):
            return
        shard, limits = self._core.shard, self._core.limits
        try:
            forms = _Forms(count, self._stage_idx, limits, shard.is_first, shard.is_last)
        except MisuseError:
            return  # too large for one record
        self._forms.setdefault(len(forms.inputs.plain), forms)

    async def serve(self) -> None:
        """Serve steps for as long as they are of this kind, and come soon. Raises LinkBroken."""
        while self._forms:
            try:
                plain = await self._upstream.peek()
            except TransportError as error:
                raise UPSTREAM.broken(error) from error
            forms = None if plain is None else self._forms.get(len(plain))
            if plain is None or forms is None or not self._compute(plain, forms):
                return
            self._upstream.drop()
            try:
                await self._downstream.send_form(forms.outputs)
            except TransportError as error:
                raise DOWNSTREAM.broken(error) from error
            self._core.keep()

    def _compute(self, plain: memoryview, forms: "_Forms") -> bool:
        """Make a frame's step, and lay its outputs out; False where that is for others to try."""
        inputs, headers = forms.inputs, forms.headers
        if not inputs.fits(plain):
            return False
        step = headers.read(plain, inputs.header_start, forms.wants)
        if step is None:
            return False
        number, segments = step
        started = perf_counter_ns()
        try:
            rows, _ = self._core.decode(number, segments, plain[inputs.places[0][0] :])
        except (MessageError, ValueError):
            return False  # they say why
        count = len(segments)
        timing = self._meter.step(count, count, perf_counter_ns() - started)
        outputs = forms.outputs
        out = outputs.plain
        headers.forward(plain, inputs.header_start, out, outputs.header_start, timing)
        out[outputs.places[0][0] :] = rows
        return True


class _Forms:
    """What a step of `count` requests looks like on both sides of a stage."""

    def __init__(
        self, count: int, stage_idx: int, limits: SessionLimits, is_first: bool, is_last: bool
    ) -> None:
        timings = (StageTiming(0, 0, 0),) * (stage_idx + 1)
        segments, wants = (Segment(0, 0, 1),) * count, (Want.TOKEN,) * count
        header = StepHeader(StepKind.STEP, 0, segments, wants, timings[1:])
        ids = token_specs(count)
        rows = activation_specs(DType.F32, count, limits.hidden_dim)
        self.inputs = _form(header, ids if is_first else rows)
        self.outputs = _form(header._replace(timings=timings), ids if is_last else rows)
        self.headers = DecodeHeaders(count, stage_idx)
        # Logits are the ordinary way's.
        self.wants: Collection[int] = TOKEN if is_last else ANY


def _form(header: StepHeader, specs: tuple[TensorSpec, ...]) -> FrameForm:
    tensors = tuple(Tensor(spec, memoryview(bytes(spec.nbytes))) for spec in specs)
    return FrameForm(Frame(FrameKind.DATA, encode_step(header), tensors))
