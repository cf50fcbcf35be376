"""Against `vllm_engines`, which are written from vLLM's documentation."""

import sys
import tomllib
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
)  # fmt: skip
from tests.pipeline.stego.adapters.vllm_engines import (
    BatchUpdate,
    CurrentBase,
    CurrentRunner,
    LegacyBase,
    LegacyRunner,
    SamplingParams,
    config,
    install,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[4]
PROMPTS = (PROMPT, (9, 8, 7), (20, 21, 22, 23))


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """Both interfaces, as an installed vLLM has them."""
    vllm_processor._entry_point.cache_clear()
    install(monkeypatch, "vllm", SamplingParams=SamplingParams, __version__="1.0")
    install(monkeypatch, vllm_processor.CURRENT, LogitsProcessor=CurrentBase)
    install(monkeypatch, vllm_processor.LEGACY, LogitsProcessor=LegacyBase)
    yield
    vllm_processor._entry_point.cache_clear()


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


def test_a_class_that_vllm_loads_twice_writes_the_message_once():
    """By its entry point, and because it was named."""
    kind = vllm_processor.StegoLogitsProcessor

    class Twice:
        def __init__(self, *arguments):
            self.both = [kind(*arguments), kind(*arguments)]

        def add_request(self, *arguments):
            return [each.add_request(*arguments) for each in self.both] == [True, True]

        def apply_staged_writes(self):
            pass

        def apply(self, logits, ctx):
            for each in self.both:
                logits = each.apply(logits, ctx)
            return logits

    runner = CurrentRunner(Twice)
    runner.add("ours", PROMPT, sealed_params(b"once"))
    assert read(runner.run()["ours"][:-1]) == b"once"


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
