"""Small random models written to disk, their transformers oracle, and ways to run our shards."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.dtypes import FLOAT16
from pipeline.errors import InputError
from pipeline.kernels.huge_pages import give_back, reserve
from pipeline.kernels.kernel_selection import choose_kernels
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.runtime import set_num_threads
from pipeline.models.config import load_config
from pipeline.models.registry import ModelShard, load_shard
from pipeline.protocol.batch import Segment
from pipeline.weights.tensor_sinks import fill_array

# The fixtures, for the conftest of each directory that wants them.
__all__ = [
    "_quiet_oracle", "kernels", "make_cache", "make_oracle", "make_pipeline", "native", "oracle",
    "oracle_class", "same_random_numbers", "smollm2_dir", "token_ids",
]  # fmt: skip
VOCAB = 101
HOST = SimpleNamespace(
    zeros=reserve, give_back=give_back, fill=fill_array, to_host=lambda *arrays: arrays
)
NUM_LAYERS = 4
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=NUM_LAYERS,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "llama-untied-gqa": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2)),
    "llama-tied-llama3-rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **LLAMA,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rope_parameters=LLAMA3_ROPE,
        )
    ),
    "llama-biases-linear-rope-wide-heads": lambda: LlamaForCausalLM(
        LlamaConfig(
            **LLAMA,
            num_key_value_heads=4,
            head_dim=32,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=LINEAR_ROPE,
        )
    ),
    "mistral-sliding-window": lambda: MistralForCausalLM(
        MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=11)
    ),
    "qwen2-qkv-bias": lambda: Qwen2ForCausalLM(
        Qwen2Config(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True)
    ),
}


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter random, biases and norms too: what stays at 0 or 1 hides its own absence."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and "bias" not in name
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.2 * noise)
    return model.eval()


class Oracle:
    """A tiny model on disk, and the same model in transformers."""

    def __init__(self, directory: Path, model: PreTrainedModel, kernels: str = "auto") -> None:
        self.directory = directory
        self.model = model
        self.kernels = kernels
        self.config = load_config(directory)

    def computing_with(self, kernels: str) -> "Oracle":
        """The same, whose shards use those kernels."""
        return Oracle(self.directory, self.model, kernels)

    def shard(self, start: int, end: int, dtype: str = "float32") -> ModelShard:
        return load_shard(
            self.directory,
            self.config,
            start,
            end,
            dtype=dtype,
            kernels=self.kernels,
            expected_hashes=None,
        )

    def split(self, *bounds: int, dtype: str = "float32") -> list[ModelShard]:
        """Stages [0, bounds[0]), [bounds[0], bounds[1]), ... to the last layer."""
        edges = (0, *bounds, self.config.num_layers)
        return [self.shard(start, end, dtype) for start, end in itertools.pairwise(edges)]

    @torch.no_grad()
    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model(token_ids.unsqueeze(0)).logits[0]

    @torch.no_grad()
    def greedy(self, token_ids: torch.Tensor, count: int) -> tuple[list[int], torch.Tensor]:
        """Tokens and logits [count, vocab], never stopping at an end token."""
        output = self.model(token_ids.unsqueeze(0), use_cache=True, logits_to_keep=1)
        tokens, rows = [], []
        for _ in range(count):
            rows.append(output.logits[0, -1])
            tokens.append(int(rows[-1].argmax()))
            output = self.model(
                torch.tensor([tokens[-1:]]),
                use_cache=True,
                past_key_values=output.past_key_values,
            )
        return tokens, torch.stack(rows)


class Pipeline:
    """Shards run one after another in this process, each with its own cache; tensors in and out."""

    def __init__(self, shards: list[ModelShard], num_slots: int = 1, max_seq: int = 128) -> None:
        self.shards = shards
        self.caches = [shard.new_cache(num_slots, max_seq) for shard in shards]

    def hidden(self, token_ids: torch.Tensor, batch: list[Segment]) -> torch.Tensor:
        rows = token_ids.numpy()
        for shard, cache in zip(self.shards, self.caches, strict=True):
            (rows,) = shard.kernels.to_host(shard.forward(rows, batch, cache))
        return torch.from_numpy(rows)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        last = self.shards[-1]
        (logits,) = last.kernels.to_host(last.logits(last.kernels.to_device(hidden.numpy())))
        return torch.from_numpy(logits)

    def logits(self, token_ids: torch.Tensor, batch: list[Segment]) -> torch.Tensor:
        """Of every row."""
        return self.head(self.hidden(token_ids, batch))

    def greedy(self, token_ids: torch.Tensor, count: int) -> tuple[list[int], torch.Tensor]:
        """As the oracle's: one prefill, then one token a step."""
        tokens: list[int] = []
        found, rows, position = [], token_ids, 0
        while len(tokens) < count:
            hidden = self.hidden(rows, [Segment(0, position, len(rows))])
            position += len(rows)
            found.append(self.head(hidden[-1:])[0])
            tokens.append(int(found[-1].argmax()))
            rows = torch.tensor(tokens[-1:])
        return tokens, torch.stack(found)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Whatever ran before, a test's random inputs are the same: tolerances are not luck."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _quiet_oracle():
    set_num_threads(1)  # small products: more threads only wait for each other
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def make_pipeline():
    return Pipeline


@pytest.fixture(scope="session")
def make_oracle(tmp_path_factory):
    """Name of a family -> its oracle, written once per run."""
    made: dict[str, Oracle] = {}

    def get(family: str) -> Oracle:
        if family not in made:
            torch.manual_seed(0)
            model = randomise(FAMILIES[family]())
            directory = tmp_path_factory.mktemp(family)
            model.save_pretrained(directory)
            made[family] = Oracle(directory, model)
        return made[family]

    return get


@pytest.fixture(params=["torch", "native"], scope="session")
def kernels(request):
    """Each set of kernels that computes on this machine."""
    return request.param if request.param == "torch" else request.getfixturevalue("native")


@pytest.fixture(scope="session")
def native(make_oracle):
    """The name of the native kernels, where there are any."""
    try:
        return choose_kernels("native", make_oracle("gpt2").config.head_dim).name
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(params=list(FAMILIES), scope="session")
def oracle(request, make_oracle, kernels):
    return make_oracle(request.param).computing_with(kernels)


@pytest.fixture
def token_ids():
    return torch.randint(3, VOCAB, (23,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make_cache():
    """A cache of one layer, slot and head, but for `changes`."""
    least = {"num_layers": 1, "num_slots": 1, "num_kv_heads": 1, "max_seq_len": 16, "head_dim": 16}
    return lambda memory=HOST, **changes: KVCache(memory, **least | {"dtype": FLOAT16} | changes)


@pytest.fixture(scope="session")
def oracle_class():
    return Oracle


@pytest.fixture(scope="session")
def smollm2_dir():
    directory = Path(__file__).parents[2] / "models" / "smollm2"
    if not (directory / "config.json").is_file():
        pytest.skip("no models/smollm2: run scripts/download_model.sh")
    return directory
