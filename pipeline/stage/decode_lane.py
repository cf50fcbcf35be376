"""The straight way through a stage, for steps of one token for each request.

Such a step comes with every token, and between two of them all of a shard's weights pass through
the processor's caches, so that each call of what lies between socket and kernels costs
microseconds: two hundred of them a tenth of a small model's token. Here they are a few dozen. The
bytes on the wire, the ciphers and the checks are the same; whatever is not plainly such a step is
left, as it came, to the ordinary way, which decides what it is.
"""

from pipeline.kernels.base import FramePlace
from pipeline.kernels.recording_cache import MAX_RECORDINGS
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import step_form
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StageTiming, StepHeader, StepKind, decode_step
from pipeline.protocol.step_limits import token_specs
from pipeline.protocol.step_results import expected_results
from pipeline.stage.data_channels import DOWNSTREAM, UPSTREAM
from pipeline.stage.stage_metrics import StageMeter
from pipeline.stage.step_executor import StageCore
from transport.channel import SecureChannel
from transport.errors import MisuseError, TransportError
from transport.tensor_frames import FrameForm


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
        self._known: set[int] = set()

    def learn(self, header: StepHeader) -> None:
        """From now on take such steps, if they can be taken, as one that has just been served."""
        count = len(header.segments)
        is_full = len(self._known) == MAX_RECORDINGS
        can_serve = self._core.decodes_in_place and self._core.is_decoding(header)
        if count in self._known or is_full or not can_serve:
            return
        self._known.add(count)
        try:
            forms = _Forms(count, self._stage_idx, self._core)
        except MisuseError:
            return  # too large for one record
        self._forms[len(forms.inputs.plain)] = forms

    async def serve(self) -> None:
        """Serve steps for as long as they are of this kind, and come soon. Raises LinkBroken."""
        meter, forms_of = self._meter, self._forms
        if not (forms_of and self._core.decodes_in_place):
            return
        while True:
            try:
                frame = await self._upstream.peek()
            except TransportError as error:
                raise UPSTREAM.broken(error) from error
            forms = None if frame is None else forms_of.get(len(frame))
            if frame is None or forms is None:
                return
            compute_ns = forms.serve(frame, *meter.spent())
            if compute_ns < 0:
                return
            self._core.computed(frame[forms.inputs.header_start : forms.inputs.header_stop])
            try:
                await self._downstream.send_form(forms.outputs)
            except TransportError as error:
                raise DOWNSTREAM.broken(error) from error
            finally:
                self._count(frame, forms, compute_ns)

    def wipe(self) -> None:
        """Zero the activations and tokens of the last steps, and let go of what computes them."""
        for forms in self._forms.values():
            forms.rows[:] = bytes(len(forms.rows))
        self._forms.clear()

    def _count(self, frame: memoryview, forms: "_Forms", compute_ns: int) -> None:
        """What need not be done before the step goes on."""
        form = forms.inputs
        header = decode_step(frame[form.header_start : form.header_stop].tobytes())
        self._core.served(header.step, header.segments, forms.rows)
        self._meter.count(forms.count, forms.count, compute_ns)
        self._upstream.drop()


class _Forms:
    """What a step of `count` requests looks like on both sides of a stage, and what takes it."""

    def __init__(self, count: int, stage_idx: int, core: StageCore) -> None:
        self.count = count
        timings = (StageTiming(0, 0, 0),) * (stage_idx + 1)
        want = Want.HIDDEN if core.limits.has_client_ends else Want.TOKEN
        segments, wants = (Segment(0, 0, 1),) * count, (want,) * count
        header = StepHeader(StepKind.STEP, 0, segments, wants, timings[1:])
        rows = core.limits.codec.specs(count)
        self.inputs = step_form(header, token_specs(count) if core.shard.is_first else rows)
        following = header._replace(timings=timings)
        shape = core.shard.config.vocab_size, core.limits.codec.hidden_dim
        results = expected_results(following, *shape) if core.is_last else rows
        self.outputs = step_form(following, results)
        self.rows = self.outputs.plain[self.outputs.places[-1][0] :]
        self.serve = core.server(count, _place(self.inputs), _place(self.outputs))


def _place(form: FrameForm) -> FramePlace:
    return FramePlace(form.plain, form.header_start, form.places[-1][0])
