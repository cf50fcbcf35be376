"""Against engines that call back as the documentation of both interfaces of vLLM says."""

import enum
import sys
import tomllib
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.stego.adapters import vllm_processor
from pipeline.stego.adapters.encoder import StegoEncoder
from pipeline.stego.adapters.sealed_request import sealed_arguments
from pipeline.stego.adapters.vllm_processor import (
    REQUEST_ARG,
    StegoRequests,
    VllmEngine,
    processor_class,
)  # fmt: skip
from pipeline.stego.errors import StegoError
from pipeline.stego.message import seal
from tests.pipeline.stego.adapters.toys import (
    CONTEXT,
    END,
    HOW,
    PROMPT,
    SECRET,
    ToyTokenizer,
    is_forced,
    new_request,
    read,
    toy_logits,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[4]
PROMPTS = (PROMPT, (9, 8, 7), (20, 21, 22, 23))


class CurrentBase(ABC):
    def __init__(self, vllm_config, req_states):
        return

    @classmethod
    def validate_params(cls, sampling_params):
        return None

    def add_request(self, req_idx, sampling_params):
        return True

    def apply_staged_writes(self):
        return None

    @abstractmethod
    def apply(self, logits, ctx):
        raise NotImplementedError


class LegacyBase(ABC):
    @classmethod
    def validate_params(cls, sampling_params):
        return None

    @abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory):
        raise NotImplementedError

    @abstractmethod
    def apply(self, logits):
        raise NotImplementedError

    @abstractmethod
    def is_argmax_invariant(self):
        raise NotImplementedError

    @abstractmethod
    def update_state(self, batch_update):
        raise NotImplementedError


class MoveDirectionality(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list
    added: list
    moved: list


@dataclass
class SamplingParams:
    extra_args: dict | None = None
    max_tokens: int = 400
    temperature: float = 1.0
    detokenize: bool = True


def install(monkeypatch, name, **members):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ".".join(parts[:i])
        if module not in sys.modules:
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """Both interfaces, as an installed vLLM has them."""
    vllm_processor._entry_point.cache_clear()
    install(monkeypatch, "vllm", SamplingParams=SamplingParams, __version__="1.0")
    install(monkeypatch, vllm_processor.CURRENT, LogitsProcessor=CurrentBase)
    install(monkeypatch, vllm_processor.LEGACY, LogitsProcessor=LegacyBase)
    yield
    vllm_processor._entry_point.cache_clear()


def config(**changes):
    found = SimpleNamespace(
        speculative_config=None, parallel_config=SimpleNamespace(world_size=1), model_config=None
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


class CurrentRunner:
    """Model Runner V2: slots from a free list, rows in any order, prompts in chunks."""

    def __init__(self, kind, vllm_config=None, *, num_slots=4, chunk=100):
        def lengths():
            return SimpleNamespace(np=np.zeros(num_slots, np.int32))

        self.states = SimpleNamespace(prompt_len=lengths(), prefill_len=lengths())
        self.processor = kind(vllm_config or config(), self.states)
        self.free = list(range(num_slots))
        self.active = {}
        self.answers = {}
        self.chunk = chunk
        self.rng = np.random.default_rng(1)

    def add(self, name, prompt, params, output=()):
        slot = self.free.pop()
        self.answers[name] = self.processor.add_request(slot, params)
        self.states.prompt_len.np[slot] = len(prompt)
        self.states.prefill_len.np[slot] = len(prompt) + len(output)
        self.active[name] = [slot, list(prompt), list(output), 0, params]

    def preempt(self, name):
        slot, prompt, output, _, params = self.active.pop(name)
        self.free.append(slot)
        self.add(name, prompt, params, output)

    def step(self):
        self.processor.apply_staged_writes()
        names = list(self.active)
        self.rng.shuffle(names)
        rows, token_ids, positions, slots = [], [], [], []
        for name in names:
            slot, prompt, output, num_computed, _ = self.active[name]
            text = prompt + output
            end = min(num_computed + self.chunk, len(text))
            self.active[name][3] = end
            rows.append(toy_logits(text[:end]))
            token_ids.append(text[end - 1])
            positions.append(end - 1)
            slots.append(slot)
        logits = torch.stack(rows)
        ctx = SimpleNamespace(
            expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping_np=np.array(slots, np.int32),
            expanded_local_pos=torch.zeros(len(slots), dtype=torch.int32),
            input_ids=torch.tensor(token_ids),
            pos=torch.tensor(positions),
            seq_lens_upper_bound_np=np.array(positions) + 1,
        )
        logits = self.processor.apply(logits, ctx)
        finished = {}
        for name, row in zip(names, logits, strict=True):
            slot, prompt, output, num_computed, params = self.active[name]
            if num_computed < len(prompt + output):
                continue  # what was sampled behind a part of the prompt is thrown away
            output.append(int(row.argmax()))
            if output[-1] == END or len(output) == params.max_tokens:
                finished[name] = output
                del self.active[name]
                self.free.append(slot)
        return finished

    def run(self):
        finished = {}
        while self.active:
            finished |= self.step()
        return finished


class LegacyRunner:
    """Runner V1: who comes takes a free row or a new one; then the last rows fill the others."""

    def __init__(self, kind, vllm_config=None):
        self.processor = kind(vllm_config or config(), torch.device("cpu"), False)
        assert self.processor.is_argmax_invariant() is False
        self.rows, self.removed, self.added, self.moved = [], [], [], []

    def add(self, name, prompt, params):
        output = []
        index = self.removed.pop(0) if self.removed else len(self.rows)
        if index == len(self.rows):
            self.rows.append(None)
        self.rows[index] = [name, list(prompt), output, params]
        self.added.append((index, params, list(prompt), output))

    def swap(self, first, second):
        self.condense()
        self.moved.append((first, second, MoveDirectionality.SWAP))
        self.rows[first], self.rows[second] = self.rows[second], self.rows[first]

    def condense(self):
        while None in self.rows:
            row = self.rows.pop()
            if row is not None:
                hole = self.rows.index(None)
                self.rows[hole] = row
                self.moved.append((len(self.rows), hole, MoveDirectionality.UNIDIRECTIONAL))

    def step(self):
        self.condense()
        update = None
        if self.removed or self.added or self.moved:
            update = BatchUpdate(len(self.rows), self.removed, self.added, self.moved)
            self.removed, self.added, self.moved = [], [], []
        self.processor.update_state(update)
        logits = torch.stack([toy_logits(prompt + out) for _, prompt, out, _ in self.rows])
        logits = self.processor.apply(logits)
        finished = {}
        for index, ((name, _, output, params), row) in enumerate(
            zip(list(self.rows), logits, strict=True)
        ):
            output.append(int(row.argmax()))
            if output[-1] == END or len(output) == params.max_tokens:
                finished[name] = output
                self.rows[index] = None
                self.removed.append(index)
        return finished

    def run(self):
        finished = {}
        while any(self.rows):
            finished |= self.step()
        return finished


RUNNERS = [CurrentRunner, LegacyRunner]


@pytest.mark.parametrize("runner_kind", RUNNERS)
def test_requests_side_by_side_and_in_recycled_places_carry_a_message_each(runner_kind):
    requests = StegoRequests()
    runner = runner_kind(processor_class(requests))
    messages, finished = {}, {}
    for i in range(7):
        message, prompt = b"m" * (1 + 5 * (i % 3)) + bytes([i]), PROMPTS[i % 3]
        params = SamplingParams(requests.begin(new_request(message)))
        runner.add(i, prompt, params)
        messages[i] = message, prompt
        while len(messages) - len(finished) == 3:
            finished |= runner.step()
    finished |= runner.run()
    assert finished.keys() == messages.keys()
    for i, (message, prompt) in messages.items():
        assert finished[i][-1] == END
        assert read(finished[i][:-1], prompt) == message


@pytest.mark.parametrize("runner_kind", RUNNERS)
def test_requests_of_others_are_left_alone_in_whatever_place(runner_kind):
    def text_of(with_ours):
        requests = StegoRequests()
        runner = runner_kind(processor_class(requests))
        if with_ours:
            for _ in range(3):
                runner.add("ours", PROMPT, SamplingParams(requests.begin(new_request(b"x"))))
                runner.run()
        runner.add("theirs", (5, 6, 7), SamplingParams(max_tokens=30))
        if with_ours:
            runner.add("ours", PROMPT, SamplingParams(requests.begin(new_request(b"x"))))
        return runner.run()["theirs"]

    assert text_of(with_ours=True) == text_of(with_ours=False)


def test_rows_that_swap_places_keep_their_messages():
    requests = StegoRequests()
    runner = LegacyRunner(processor_class(requests))
    for name, prompt in enumerate(PROMPTS[:2]):
        runner.add(name, prompt, SamplingParams(requests.begin(new_request(b"no %d" % name))))
    runner.add("theirs", (10, 20, 30), SamplingParams(max_tokens=300))
    finished = {}
    for first, second in ((0, 1), (1, 2), (0, 2), (2, 0)):
        finished |= runner.step()
        runner.swap(first, second)
    finished |= runner.run()
    assert [read(finished[i][:-1], PROMPTS[i]) for i in (0, 1)] == [b"no 0", b"no 1"]


def test_the_slot_answers_whether_it_is_ours():
    requests = StegoRequests()
    runner = CurrentRunner(processor_class(requests))
    runner.add("ours", PROMPT, SamplingParams(requests.begin(new_request())))
    runner.add("theirs", PROMPT, SamplingParams())
    assert runner.answers == {"ours": True, "theirs": False}


def test_parts_of_a_prompt_cost_no_token():
    requests = StegoRequests()
    runner = CurrentRunner(processor_class(requests), chunk=2)
    runner.add("ours", PROMPT, SamplingParams(requests.begin(new_request(b"long prompt"))))
    text = runner.run()["ours"]
    assert read(text[:-1]) == b"long prompt"


def test_a_request_that_is_computed_anew_goes_on_where_it_was():
    requests = StegoRequests()
    runner = CurrentRunner(processor_class(requests), chunk=7)
    runner.add("ours", PROMPT, SamplingParams(requests.begin(new_request(b"preempted"))))
    for _ in range(20):
        runner.step()
    runner.preempt("ours")
    assert read(runner.run()["ours"][:-1]) == b"preempted"


def test_tokens_that_are_still_computed_are_no_other_tokens():
    requests = StegoRequests()
    request = new_request()
    processor = processor_class(requests)(config(), torch.device("cpu"), False)
    output = []
    params = SamplingParams(requests.begin(request))
    processor.update_state(BatchUpdate(1, [], [(0, params, list(PROMPT), output)], []))
    for _ in range(3):
        processor.update_state(None)
        processor.apply(torch.randn(1, END + 1))
        output.append(-1)
    assert request.num_tokens == 3
    assert not request.is_over


@pytest.mark.parametrize("runner_kind", RUNNERS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"speculative_config": object()}, "speculative"),
        ({"parallel_config": SimpleNamespace(world_size=2)}, "one"),
    ],
)
def test_drafts_and_several_gpus_are_refused_and_the_engine_lives(runner_kind, changes, reason):
    requests, request = StegoRequests(), new_request()
    runner = runner_kind(processor_class(requests), config(**changes))
    runner.add("ours", PROMPT, SamplingParams(requests.begin(request)))
    runner.add("theirs", PROMPT, SamplingParams(max_tokens=5))
    finished = runner.run()
    assert finished["ours"] == [END]
    assert len(finished["theirs"]) == 5
    with pytest.raises(StegoError, match=reason):
        request.result()


def test_a_row_for_each_drafted_token_is_refused():
    requests, request = StegoRequests(), new_request()
    states = SimpleNamespace(
        prompt_len=SimpleNamespace(np=np.array([5])), prefill_len=SimpleNamespace(np=np.array([5]))
    )
    processor = processor_class(requests)(config(), states)
    processor.add_request(0, SamplingParams(requests.begin(request)))
    logits = torch.randn(3, END + 1)
    ctx = SimpleNamespace(
        expanded_idx_mapping=torch.tensor([0, 0, 0]), idx_mapping_np=np.array([0]),
        input_ids=torch.tensor([5, 6, 7]), pos=torch.tensor([4, 5, 6]),
    )  # fmt: skip
    processor.apply(logits, ctx)
    assert [is_forced(row) for row in logits] == [END] * 3
    with pytest.raises(StegoError, match="speculative"):
        request.result()


def test_a_name_that_no_request_has_is_refused_at_the_door():
    kind = processor_class(StegoRequests())
    kind.validate_params(SamplingParams())
    kind.validate_params(SamplingParams({"other": 1}))
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        kind.validate_params(SamplingParams({REQUEST_ARG: "1-1"}))


def test_a_request_that_has_ended_is_forgotten():
    requests = StegoRequests()
    arguments = requests.begin(new_request())
    requests.end(arguments)
    assert requests.open(arguments) is None
    with pytest.raises(StegoError):
        requests.check(arguments)


def sealed_params(message):
    return SamplingParams(
        sealed_arguments(seal(message, SECRET, CONTEXT), "range", HOW, END)
    )  # fmt: skip


@pytest.mark.parametrize("runner_kind", RUNNERS)
def test_the_entry_point_writes_what_comes_sealed_in_the_arguments(runner_kind):
    kind = vllm_processor.StegoLogitsProcessor
    assert vllm_processor.StegoLogitsProcessor is kind
    params = sealed_params(b"over HTTP")
    kind.validate_params(params)
    runner = runner_kind(kind)
    runner.add("ours", PROMPT, params)
    assert read(runner.run()["ours"][:-1]) == b"over HTTP"


@pytest.mark.parametrize("runner_kind", RUNNERS)
@pytest.mark.parametrize("sealed", ["", "{}", 7, None, [], '{"header": "zz"}'])
def test_arguments_that_make_no_sense_are_refused_and_never_stop_the_engine(runner_kind, sealed):
    kind = vllm_processor.StegoLogitsProcessor
    params = SamplingParams({"stego_sealed": sealed}, max_tokens=5)
    if sealed is not None:
        with pytest.raises(ValueError, match="stego_sealed"):
            kind.validate_params(params)
    runner = runner_kind(kind)
    runner.add("ours", PROMPT, params)
    assert len(runner.run()["ours"]) == 5


def test_either_interface_alone_will_do(monkeypatch):
    monkeypatch.setitem(sys.modules, vllm_processor.CURRENT, None)
    kind = processor_class(StegoRequests())
    assert issubclass(kind, LegacyBase)
    monkeypatch.setitem(sys.modules, vllm_processor.LEGACY, None)
    with pytest.raises(StegoError, match="not installed"):
        processor_class(StegoRequests())


def test_vllm_finds_the_class_by_its_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["vllm.logits_processors"].values()
    found = EntryPoint("veilpipe", value, "vllm.logits_processors").load()
    assert found is vllm_processor.StegoLogitsProcessor


def test_both_interfaces_accept_the_class():
    kind = vllm_processor.StegoLogitsProcessor
    assert issubclass(kind, CurrentBase)
    assert issubclass(kind, LegacyBase)
    with pytest.raises(AttributeError):
        _ = vllm_processor.NoSuchThing


class Llm:
    """vLLM's `LLM` as far as an engine needs it."""

    llm_engine = SimpleNamespace(model_config=SimpleNamespace(model="toy", dtype="float32"))

    def __init__(self, runner):
        self.runner = runner

    def get_tokenizer(self):
        tokenizer = ToyTokenizer()
        tokenizer.eos_token_id = END
        tokenizer.all_special_ids = [END]
        return tokenizer

    def generate(self, prompt, params, use_tqdm):
        self.runner.add("it", prompt["prompt_token_ids"], params)
        token_ids = self.runner.run()["it"]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=token_ids)])]


@pytest.mark.parametrize("runner_kind", RUNNERS)
def test_a_message_goes_through_text_and_back(runner_kind):
    requests = StegoRequests()
    engine = VllmEngine(Llm(runner_kind(processor_class(requests))), requests)
    encoder = StegoEncoder(engine, SECRET, "range", HOW)
    text = encoder.encode("meet at nine", "Dear all")
    assert encoder.decode(text, "Dear all") == b"meet at nine"
    assert not requests._requests
