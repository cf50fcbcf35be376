"""What vLLM calls with logits, by its current interface and by its legacy one of V1.

vLLM wants a subclass of its own base class, and of two where both model runners may be chosen, so
the class is made when it is first asked for: `processor_class` for requests of this process, the
attribute `StegoLogitsProcessor` for the entry point. A request is ours if its `extra_args` say so.

Source: vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor, which keeps requests in slots
that are recycled without a word, and has rows in any order; vllm.v1.sample.logits_processor, where
a row is a request's place in a batch whose changes are told.
"""

import functools
import importlib
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch

from pipeline.stego.adapters.encoder import TextTokenizer
from pipeline.stego.adapters.request import StegoRequest
from pipeline.stego.adapters.sealed_request import SealedRequests
from pipeline.stego.errors import StegoError

_Vllm: TypeAlias = Any  # what vLLM passes: nothing of it is imported here

CURRENT = "vllm.v1.worker.gpu.sample.logits_processor"
LEGACY = "vllm.v1.sample.logits_processor"
# In `extra_args`, or `vllm_xargs` over HTTP.
REQUEST_ARG = "stego_request"

_logger = logging.getLogger(__name__)

_DRAFTS = "vLLM drafts tokens that no message has chosen; switch off speculative decoding"
_PARALLEL = "every GPU of several would choose tokens of its own; use one"


class RequestSource(Protocol):
    """Knows a request by its arguments."""

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise StegoError for arguments that are ours and make no sense."""
        ...

    def open(self, arguments: Mapping[str, Any]) -> StegoRequest | None:
        """The request; none if it is not ours. Raises StegoError."""
        ...


class StegoRequests:
    """Requests of this process, by a name that goes into their arguments."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._requests: dict[str, StegoRequest] = {}

    def begin(self, request: StegoRequest) -> dict[str, str]:
        """The `extra_args` of a request."""
        name = f"{os.getpid()}-{next(self._numbers)}"
        self._requests[name] = request
        return {REQUEST_ARG: name}

    def end(self, arguments: Mapping[str, str]) -> None:
        """Forget a request."""
        del self._requests[arguments[REQUEST_ARG]]

    def check(self, arguments: Mapping[str, Any]) -> None:
        """As `RequestSource.check`. Raises StegoError."""
        name = arguments.get(REQUEST_ARG)
        if name is not None and name not in self._requests:
            raise StegoError(
                f"{REQUEST_ARG}: no request of that name was begun in this process; vLLM has to "
                "run in it: set VLLM_ENABLE_V1_MULTIPROCESSING=0"
            )

    def open(self, arguments: Mapping[str, Any]) -> StegoRequest | None:
        """As `RequestSource.open`."""
        return self._requests.get(arguments.get(REQUEST_ARG, ""))


class _Row(NamedTuple):
    """A request of the legacy interface, and the engine's own list of its tokens so far."""

    request: StegoRequest
    token_ids: Sequence[int]


class _Processor:
    """Both interfaces at once: the number of arguments tells which one calls."""

    source: ClassVar[RequestSource]

    def __init__(
        self,
        vllm_config: _Vllm,
        states_or_device: _Vllm,
        is_pin_memory: bool = False,
    ) -> None:
        """Current: (config, states of all requests). Legacy: (config, device, whether pinned)."""
        del is_pin_memory
        self._fault = _fault_of(vllm_config)
        self._states = states_or_device
        self._slots: dict[int, StegoRequest] = {}
        self._rows: dict[int, _Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: _Vllm) -> None:
        """Raise ValueError, as vLLM wants it, for arguments that are ours and make no sense."""
        try:
            cls.source.check(_arguments(sampling_params))
        except StegoError as error:
            raise ValueError(str(error)) from error

    def _open(self, sampling_params: _Vllm) -> StegoRequest | None:
        try:
            request = self.source.open(_arguments(sampling_params))
        except StegoError as error:
            # Attack: whoever may send requests would stop the engine, in which nothing may raise.
            _logger.warning("stego request ignored reason=%s", error)
            return None
        if request is not None and self._fault is not None:
            request.fail(StegoError(self._fault))
        return request

    def is_argmax_invariant(self) -> bool:
        """No: the most likely token is the one that is forced."""
        return False

    def add_request(self, req_idx: int, sampling_params: _Vllm) -> bool:
        """Take a slot for a request, whoever had it before; whether it is ours."""
        request = self._open(sampling_params)
        self._slots.pop(req_idx, None)
        if request is not None:
            self._slots[req_idx] = request
        return request is not None

    def update_state(self, batch_update: _Vllm) -> None:
        """Follow requests that leave, come, and move to other rows, in this order."""
        if batch_update is None:
            return
        rows = self._rows
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, params, _, token_ids in batch_update.added:
            rows.pop(index, None)
            request = self._open(params)
            if request is not None:
                rows[index] = _Row(request, token_ids)
        for first, second, direction in batch_update.moved:
            moved, replaced = rows.pop(first, None), rows.pop(second, None)
            if moved is not None:
                rows[second] = moved
            if replaced is not None and direction.name == "SWAP":
                rows[first] = replaced

    def apply(self, logits: torch.Tensor, ctx: _Vllm = None) -> torch.Tensor:
        """Force every row of ours, in place. Shape: [rows, vocab]."""
        if ctx is None:
            for index, row in self._rows.items():
                # What is still being computed stands there as -1.
                last = row.token_ids[-1] if row.token_ids and row.token_ids[-1] >= 0 else None
                row.request.step(logits[index], len(row.token_ids), last)
        elif not self._slots.keys().isdisjoint(ctx.idx_mapping_np.tolist()):
            self._apply_to_slots(logits, ctx)
        return logits

    def _apply_to_slots(self, logits: torch.Tensor, ctx: _Vllm) -> None:
        slots = ctx.expanded_idx_mapping.tolist()
        positions, token_ids = ctx.pos.tolist(), ctx.input_ids.tolist()
        for row, slot in enumerate(slots):
            request = self._slots.get(slot)
            if request is None:
                continue
            num_tokens = positions[row] + 1
            if num_tokens < int(self._states.prefill_len.np[slot]):
                continue  # a part of the prompt, behind which no token is taken
            if slots.count(slot) > 1:
                request.fail(StegoError(_DRAFTS))
            num_taken = num_tokens - int(self._states.prompt_len.np[slot])
            request.step(logits[row], num_taken, token_ids[row] if num_taken else None)


class VllmEngine:
    """vLLM's `LLM`, made with `logits_processors=[processor_class(requests)]`, in this process."""

    def __init__(self, llm: _Vllm, requests: StegoRequests) -> None:
        """`llm`: of one GPU, under VLLM_ENABLE_V1_MULTIPROCESSING=0, without prefix caching."""
        vllm = importlib.import_module("vllm")
        tokenizer = llm.get_tokenizer()
        model = llm.llm_engine.model_config
        self.tokenizer: TextTokenizer = tokenizer
        self.fingerprint = f"vllm {vllm.__version__} {model.model} {model.dtype}"
        self.end_token_id: int = tokenizer.eos_token_id
        self.special_token_ids: Sequence[int] = tokenizer.all_special_ids
        self._llm = llm
        self._requests = requests
        self._sampling_params = vllm.SamplingParams

    def generate(
        self, prompt_ids: Sequence[int], request: StegoRequest, max_tokens: int
    ) -> Sequence[int]:
        """As `Engine.generate`."""
        arguments = self._requests.begin(request)
        try:
            params = self._sampling_params(
                max_tokens=max_tokens, temperature=0.0, detokenize=False, extra_args=arguments
            )
            (output,) = self._llm.generate(
                {"prompt_token_ids": list(prompt_ids)}, params, use_tqdm=False
            )
        finally:
            self._requests.end(arguments)
        generated: Sequence[int] = output.outputs[0].token_ids
        return generated


def processor_class(source: RequestSource) -> type[_Processor]:
    """A class for vLLM's `logits_processors`. Raises StegoError without vLLM."""
    bases = [base for name in (CURRENT, LEGACY) if (base := _base(name)) is not None]
    if not bases:
        raise StegoError(f"vLLM is not installed, or has neither {CURRENT} nor {LEGACY}")
    return type("StegoLogitsProcessor", (_Processor, *bases), {"source": source})


@functools.cache
def _entry_point() -> type[_Processor]:
    return processor_class(SealedRequests())


def __getattr__(name: str) -> type[_Processor]:
    """`StegoLogitsProcessor`, made of vLLM's own classes when it is asked for."""
    if name == "StegoLogitsProcessor":
        return _entry_point()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _base(module: str) -> type | None:
    try:
        base: type = importlib.import_module(module).LogitsProcessor
    except ImportError:
        return None
    return base


def _arguments(sampling_params: _Vllm) -> Mapping[str, Any]:
    return sampling_params.extra_args or {}


def _fault_of(vllm_config: _Vllm) -> str | None:
    """Why no message can be hidden in what this engine generates."""
    if vllm_config.speculative_config is not None:
        return _DRAFTS
    return None if vllm_config.parallel_config.world_size == 1 else _PARALLEL
