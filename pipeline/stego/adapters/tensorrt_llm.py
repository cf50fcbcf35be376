"""What TensorRT-LLM calls with logits, one request at a time or a batch of them.

Source: `LogitsProcessor` and `BatchedLogitsProcessor` of tensorrt_llm.sampling_params. Any callable
of that signature will do, so nothing of TensorRT-LLM is needed here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pipeline.stego.adapters.request import StegoRequest
from pipeline.stego.errors import StegoError


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    request: StegoRequest
    prompt_ids: tuple[int, ...]
    client_id: int | None


class LogitsCallback:
    """Forces each request's tokens on its logits, in place; other requests' are left alone.

    Requests are told from each other by the engine's id, which nobody knows before its first call:
    that one is recognised by its prompt, and by its client id where one was given.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._running: dict[int, _Waiting] = {}

    def begin(
        self, request: StegoRequest, prompt_ids: Sequence[int], client_id: int | None = None
    ) -> None:
        """Expect a request with this prompt, as the engine will have it."""
        self._waiting.append(_Waiting(request, tuple(prompt_ids), client_id))

    def end(self, request: StegoRequest) -> None:
        """Forget a request, whether the engine has begun it or not."""
        self._waiting = [each for each in self._waiting if each.request is not request]
        self._running = {
            req_id: each for req_id, each in self._running.items() if each.request is not request
        }

    def __call__(
        self,
        req_id: int,
        logits: torch.Tensor,
        token_ids: list[list[int]],
        stream_ptr: int | None,
        client_id: int | None,
    ) -> None:
        """Force the next token.

        Shapes: logits [1, 1, vocab], token_ids [1, tokens so far, with the prompt]. Raises
        StegoError, and changes nothing, for beams and drafts of a request that is ours.
        """
        ours = self._find(req_id, token_ids, client_id)
        if ours is None:
            return
        _check_shapes(logits, token_ids)
        with _on_stream(stream_ptr, logits):
            _step(ours, logits, token_ids[0])

    def _find(
        self, req_id: int, token_ids: list[list[int]], client_id: int | None
    ) -> _Waiting | None:
        if req_id in self._running:
            return self._running[req_id]
        prompt = tuple(token_ids[0])
        for each in self._waiting:
            if each.client_id in {None, client_id} and each.prompt_ids == prompt:
                self._waiting.remove(each)
                self._running[req_id] = each
                return each
        return None


class BatchedLogitsCallback(LogitsCallback):
    """The same for a whole batch in each call."""

    def __call__(  # type: ignore[override]  # the engine's other interface, not a variant of one
        self,
        req_ids: list[int],
        logits: list[torch.Tensor],
        token_ids: list[list[list[int]]],
        stream_ptr: int | None,
        client_ids: list[int | None],
    ) -> None:
        """Force every request's next token. Raises StegoError, and changes nothing."""
        rows = zip(req_ids, logits, token_ids, client_ids, strict=True)
        ours = [
            (found, row, ids)
            for req_id, row, ids, client_id in rows
            if (found := self._find(req_id, ids, client_id)) is not None
        ]
        for _, row, ids in ours:
            _check_shapes(row, ids)
        for found, row, ids in ours:
            with _on_stream(stream_ptr, row):
                _step(found, row, ids[0])


def _step(ours: _Waiting, logits: torch.Tensor, token_ids: list[int]) -> None:
    num_taken = len(token_ids) - len(ours.prompt_ids)
    ours.request.step(logits[0, 0], num_taken, token_ids[-1] if num_taken > 0 else None)


def _check_shapes(logits: torch.Tensor, token_ids: list[list[int]]) -> None:
    if logits.ndim != 3 or logits.shape[1] != 1 or len(token_ids) != 1:
        raise StegoError(
            f"a message is hidden in one beam, and the engine has {len(token_ids)}, of logits "
            f"{list(logits.shape)}; switch off beam search"
        )
    if logits.shape[0] != 1:
        raise StegoError(
            f"the engine has logits for {logits.shape[0]} tokens at once, which are drafts; "
            "switch off speculative decoding"
        )


@contextmanager
def _on_stream(stream_ptr: int | None, logits: torch.Tensor) -> Iterator[None]:
    """Queue what follows behind the work that computes the logits."""
    if stream_ptr is None or not logits.is_cuda:
        yield
        return
    stream = torch.cuda.ExternalStream(stream_ptr, device=logits.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
