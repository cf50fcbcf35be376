"""Against an executor that calls back as TensorRT-LLM documents it: positionally, in place."""

import contextlib

import pytest
import torch

from pipeline.stego.adapters.tensorrt_llm import BatchedLogitsCallback, LogitsCallback
from pipeline.stego.errors import StegoError
from tests.pipeline.stego.adapters.toys import (
    END,
    PROMPT,
    VOCAB_SIZE,
    is_forced,
    new_request,
    read,
    toy_logits,
)  # fmt: skip

PROMPTS = (PROMPT, (9, 8, 7), (20, 21, 22, 23))


class Executor:
    """Requests side by side, one more coming in at each step; each has its ids of the engine's."""

    def __init__(self, callback, *, is_batched):
        self.callback = callback
        self.is_batched = is_batched
        self.texts = {}

    def run(self, prompts, *, first_req_id=100, client_ids=None, max_tokens=400):
        client_ids = client_ids or [None] * len(prompts)
        waiting = [
            (first_req_id + i, list(prompt), client_id)
            for i, (prompt, client_id) in enumerate(zip(prompts, client_ids, strict=True))
        ]
        active, done, self.texts = [], [], {}
        while waiting or active:
            if waiting:
                active.append(waiting.pop(0))
            rows = [toy_logits(ids).reshape(1, 1, -1) for _, ids, _ in active]
            self.call(active, rows)
            for (req_id, ids, _), row in zip(list(active), rows, strict=True):
                ids.append(int(row[0, 0].argmax()))
                num = len(ids) - len(prompts[req_id - first_req_id])
                if ids[-1] == END or num == max_tokens:
                    done.append(req_id)
                    self.texts[req_id] = tuple(ids[-num:])
            active = [each for each in active if each[0] not in done]
        return [self.texts[first_req_id + i] for i in range(len(prompts))]

    def call(self, active, rows):
        if self.is_batched:
            answer = self.callback(
                [req_id for req_id, _, _ in active],
                rows,
                [[list(ids)] for _, ids, _ in active],
                None,
                [client_id for _, _, client_id in active],
            )
            assert answer is None
            return
        for (req_id, ids, client_id), row in zip(active, rows, strict=True):
            assert self.callback(req_id, row, [list(ids)], None, client_id) is None


CALLBACKS = [(LogitsCallback, False), (BatchedLogitsCallback, True)]


@pytest.mark.parametrize(("kind", "is_batched"), CALLBACKS)
def test_several_requests_side_by_side_carry_a_message_each(kind, is_batched):
    callback = kind()
    requests = {prompt: new_request(f"for {prompt[0]}".encode()) for prompt in PROMPTS}
    for prompt, request in requests.items():
        callback.begin(request, prompt)
    Executor(callback, is_batched=is_batched).run(PROMPTS)
    for prompt, request in requests.items():
        assert read(request.result(), prompt) == f"for {prompt[0]}".encode()


@pytest.mark.parametrize(("kind", "is_batched"), CALLBACKS)
def test_requests_of_one_prompt_are_told_apart_by_their_client_ids(kind, is_batched):
    callback = kind()
    first, second = new_request(b"first"), new_request(b"second")
    callback.begin(second, PROMPT, client_id=2)
    callback.begin(first, PROMPT, client_id=1)
    texts = Executor(callback, is_batched=is_batched).run([PROMPT, PROMPT], client_ids=[1, 2])
    assert [read(text[:-1]) for text in texts] == [b"first", b"second"]


@pytest.mark.parametrize(("kind", "is_batched"), CALLBACKS)
def test_requests_of_others_are_left_alone(kind, is_batched):
    callback = kind()
    callback.begin(new_request(), PROMPT)
    _, text = Executor(callback, is_batched=is_batched).run([PROMPT, (1, 2, 3)], max_tokens=50)
    (alone,) = Executor(kind(), is_batched=is_batched).run([(1, 2, 3)], max_tokens=50)
    assert text == alone


@pytest.mark.parametrize(("kind", "is_batched"), CALLBACKS)
def test_a_request_that_has_ended_is_forgotten(kind, is_batched):
    callback = kind()
    request = new_request()
    callback.begin(request, PROMPT)
    executor = Executor(callback, is_batched=is_batched)
    executor.run([PROMPT], max_tokens=3)
    callback.end(request)
    executor.run([PROMPT], max_tokens=3)
    assert request.num_tokens == 3

    never_begun = new_request()
    callback.begin(never_begun, PROMPT)
    callback.end(never_begun)
    executor.run([PROMPT], first_req_id=200, max_tokens=3)
    assert never_begun.num_tokens == 0


@pytest.mark.parametrize(("kind", "is_batched"), CALLBACKS)
def test_one_that_fails_does_not_harm_its_neighbours(kind, is_batched):
    class Breaking(Executor):
        def call(self, active, rows):
            for (req_id, ids, _), row in zip(active, rows, strict=True):
                if req_id == 100 and len(ids) == len(PROMPT) + 4:
                    row[:] = torch.nan
            super().call(active, rows)

    callback = kind()
    broken, whole = new_request(), new_request(b"whole")
    callback.begin(broken, PROMPTS[0])
    callback.begin(whole, PROMPTS[1])
    text, _ = Breaking(callback, is_batched=is_batched).run(PROMPTS[:2])
    assert len(text) == 5  # four tokens, and the end
    with pytest.raises(StegoError, match="no numbers"):
        broken.result()
    assert read(whole.result(), PROMPTS[1]) == b"whole"


@pytest.mark.parametrize(
    ("shape", "num_beams", "reason"),
    [
        ((1, 2, VOCAB_SIZE), 2, "beam"),
        ((1, 2, VOCAB_SIZE), 1, "beam"),
        ((1, 1, VOCAB_SIZE), 2, "beam"),
        ((1, VOCAB_SIZE), 1, "beam"),
        ((4, 1, VOCAB_SIZE), 1, "speculative"),
    ],
)
def test_beams_and_drafts_are_refused_before_anything_is_changed(shape, num_beams, reason):
    token_ids = [list(PROMPT)] * num_beams
    callback, batched = LogitsCallback(), BatchedLogitsCallback()
    callback.begin(new_request(), PROMPT)
    batched.begin(new_request(), PROMPT)
    neighbour = new_request()
    batched.begin(neighbour, (1, 2))
    logits, other = torch.zeros(shape), torch.zeros(1, 1, VOCAB_SIZE)
    with pytest.raises(StegoError, match=reason):
        callback(1, logits, token_ids, None, None)
    with pytest.raises(StegoError, match=reason):
        batched([5, 6], [other, logits], [[[1, 2]], token_ids], None, [None, None])
    assert not logits.any()
    assert not other.any()
    assert neighbour.num_tokens == 0


def test_lists_of_different_lengths_are_no_batch():
    with pytest.raises(ValueError, match="zip"):
        BatchedLogitsCallback()([1, 2], [torch.zeros(1, 1, 4)], [[[1]]], None, [None])


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("stream_ptr", [0, 77])
def test_the_engines_stream_is_used_where_logits_lie_on_a_gpu(monkeypatch, stream_ptr):
    events = []

    @contextlib.contextmanager
    def stream(which):
        events.append(("enter", which))
        yield
        events.append(("leave", which))

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device: ("stream", ptr))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    callback, request = LogitsCallback(), new_request()
    callback.begin(request, PROMPT)
    original_step = request.step
    monkeypatch.setattr(
        request, "step", lambda *arguments: (events.append("step"), original_step(*arguments))
    )
    logits = toy_logits(PROMPT).reshape(1, 1, -1)
    callback(1, logits.as_subclass(OnGpu), [list(PROMPT)], stream_ptr, None)
    which = ("stream", stream_ptr)
    assert events == [("enter", which), "step", ("leave", which)]
    is_forced(logits[0, 0])


def test_no_stream_is_needed_on_a_cpu_or_by_the_pytorch_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *_, **__: pytest.fail("used"))
    for logits, stream_ptr in (
        (toy_logits(PROMPT).reshape(1, 1, -1), 77),
        (toy_logits(PROMPT).reshape(1, 1, -1).as_subclass(OnGpu), None),
    ):
        callback = LogitsCallback()
        callback.begin(new_request(), PROMPT)
        callback(1, logits, [list(PROMPT)], stream_ptr, None)
        is_forced(logits.as_subclass(torch.Tensor)[0, 0])
