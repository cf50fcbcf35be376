"""Against a stand-in for the library: its names and arguments are those of TensorRT-LLM 1.0."""

import enum
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.stego.adapters.encoder import StegoEncoder, next_token_weights
from pipeline.stego.adapters.tensorrt_llm_model import TensorRtEngine, TensorRtSettings
from pipeline.stego.errors import StegoError
from tests.pipeline.stego.adapters.toys import (
    END,
    HOW,
    PROMPT,
    SECRET,
    ToyTokenizer,
    new_request,
    toy_logits,
)  # fmt: skip


class QuantAlgo(enum.Enum):
    FP8 = "FP8"


@dataclass
class QuantConfig:
    quant_algo: QuantAlgo | None = None
    kv_cache_quant_algo: QuantAlgo | None = None


@dataclass
class BuildConfig:
    max_batch_size: int = 2048
    max_seq_len: int | None = None
    max_beam_width: int = 1


@dataclass
class KvCacheConfig:
    enable_block_reuse: bool = True


@dataclass
class SamplingParams:
    end_id: int | None = None
    max_tokens: int = 32
    top_k: int | None = None
    logits_processor: object = None
    detokenize: bool = True


@dataclass
class Llm:
    """Builds unless the model is a directory that it has saved; calls back for each token."""

    model: str
    tokenizer: str | None = None
    build_config: BuildConfig | None = None
    quant_config: QuantConfig | None = None
    kv_cache_config: KvCacheConfig | None = None
    made: list = field(default_factory=list)
    fails_to_save = False

    def __post_init__(self):
        type(self).all.append(self)
        self.is_built = not Path(self.model, "rank0.engine").exists()

    def save(self, engine_dir):
        Path(engine_dir, "config.json").write_text("{}")
        if type(self).fails_to_save:
            raise OSError("no room")
        Path(engine_dir, "rank0.engine").write_bytes(b"engine")

    def generate(self, inputs, sampling_params, use_tqdm=True):
        text = list(inputs["prompt_token_ids"])
        num_prompt = len(text)
        while len(text) - num_prompt < sampling_params.max_tokens:
            logits = toy_logits(text).reshape(1, 1, -1)
            sampling_params.logits_processor(17, logits, [list(text)], None, 4)
            text.append(int(logits[0, 0].argmax()))
            if text[-1] == sampling_params.end_id:
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=text[num_prompt:])])


@pytest.fixture(autouse=True)
def library(monkeypatch):
    class Fresh(Llm):
        pass

    Fresh.all = []
    tokenizer = ToyTokenizer()
    tokenizer.eos_token_id, tokenizer.all_special_ids = END, [END]
    loader = SimpleNamespace(from_pretrained=lambda model: tokenizer)
    modules = {
        "tensorrt_llm": {"SamplingParams": SamplingParams, "__version__": "1.0.0"},
        "tensorrt_llm._tensorrt_engine": {"LLM": Fresh},
        "tensorrt_llm.llmapi": {
            "BuildConfig": BuildConfig, "KvCacheConfig": KvCacheConfig,
            "QuantAlgo": QuantAlgo, "QuantConfig": QuantConfig,
        },
        "transformers": {"AutoTokenizer": loader},
    }  # fmt: skip
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("TLLM_WORKER_USE_SINGLE_PROCESS", "FORCE_DETERMINISTIC"):
        monkeypatch.setenv(name, "0")
    return Fresh


def test_a_message_goes_through_text_and_back(tmp_path):
    engine = TensorRtEngine(TensorRtSettings("org/model"), tmp_path)
    encoder = StegoEncoder(engine, SECRET)
    text = encoder.encode("meet at nine", "Dear all")
    assert encoder.decode(text, "Dear all") == b"meet at nine"


def test_an_engine_is_built_once_and_then_loaded(library, tmp_path):
    for _ in range(2):
        TensorRtEngine(TensorRtSettings("org/model"), tmp_path / "engines")
    built, loaded = library.all
    assert built.is_built
    assert not loaded.is_built
    assert (built.model, loaded.tokenizer) == ("org/model", "org/model")
    assert built.build_config == BuildConfig(max_batch_size=1, max_seq_len=4096, max_beam_width=1)
    assert [path.name for path in (tmp_path / "engines").iterdir()] == [Path(loaded.model).name]
    assert not built.kv_cache_config.enable_block_reuse
    assert not loaded.kv_cache_config.enable_block_reuse


@pytest.mark.parametrize(
    "other",
    [
        TensorRtSettings("org/other"),
        TensorRtSettings("org/model", is_fp8=True),
        TensorRtSettings("org/model", max_seq_len=8192),
        TensorRtSettings("org/model", options={"made": [1]}),
    ],
)
def test_another_model_or_build_is_another_engine(library, tmp_path, other):
    first = TensorRtEngine(TensorRtSettings("org/model"), tmp_path)
    second = TensorRtEngine(other, tmp_path)
    assert [each.is_built for each in library.all] == [True, True]
    assert first.fingerprint != second.fingerprint


def test_another_version_of_the_library_builds_anew(library, tmp_path, monkeypatch):
    TensorRtEngine(TensorRtSettings("org/model"), tmp_path)
    monkeypatch.setattr(sys.modules["tensorrt_llm"], "__version__", "1.1.0")
    TensorRtEngine(TensorRtSettings("org/model"), tmp_path)
    assert [each.is_built for each in library.all] == [True, True]


def test_fp8_is_for_weights_and_cache(library, tmp_path):
    TensorRtEngine(TensorRtSettings("org/model", is_fp8=True), tmp_path)
    TensorRtEngine(TensorRtSettings("org/plain"), tmp_path)
    fp8, plain = library.all
    assert fp8.quant_config == QuantConfig(QuantAlgo.FP8, QuantAlgo.FP8)
    assert plain.quant_config is None


def test_an_engine_that_was_saved_in_part_is_not_taken_for_one(library, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "fails_to_save", True)
    with pytest.raises(OSError, match="no room"):
        TensorRtEngine(TensorRtSettings("org/model"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["speculative_config", "decoding_config", "lookahead_config"])
def test_speculative_decoding_is_refused(name):
    with pytest.raises(StegoError, match=f"{name}: speculative decoding"):
        TensorRtSettings("org/model", options={name: object()})


def test_the_callback_stays_in_this_process(tmp_path):
    TensorRtEngine(TensorRtSettings("org/model"), tmp_path)
    assert os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"
    assert os.environ["FORCE_DETERMINISTIC"] == "1"


def test_the_distribution_after_a_prompt_has_the_vocabularys_ids(tmp_path):
    engine = TensorRtEngine(TensorRtSettings("org/model"), tmp_path)
    weights = next_token_weights(engine, PROMPT, HOW)
    most_likely = int(weights.ids[weights.weights.argmax()])
    assert most_likely == int(toy_logits(PROMPT)[:END].argmax())


def test_more_tokens_than_asked_for_are_not_generated(tmp_path):
    engine = TensorRtEngine(TensorRtSettings("org/model"), tmp_path)
    assert len(engine.generate(PROMPT, new_request(), 7)) == 7


def test_without_the_library_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(StegoError, match="use an image or environment with TensorRT-LLM"):
        TensorRtEngine(TensorRtSettings("org/model"), tmp_path)
