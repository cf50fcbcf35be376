"""Our shards against transformers, and every split against one process."""

import itertools
from pathlib import Path

import pytest
import torch

from pipeline.models.batch import Segment

TOLERANCE = 1e-4


def test_greedy_tokens_and_logits_equal_transformers(oracle, make_pipeline, token_ids):
    expected_tokens, expected = oracle.greedy(token_ids, 64)
    tokens, logits = make_pipeline(oracle.split()).greedy(token_ids, 64)
    assert tokens == expected_tokens
    assert (logits - expected).abs().max() <= TOLERANCE


def test_every_row_of_a_prefill_equals_transformers(oracle, make_pipeline, token_ids):
    logits = make_pipeline(oracle.split()).logits(token_ids, [Segment(0, 0, len(token_ids))])
    assert (logits - oracle.logits(token_ids)).abs().max() <= TOLERANCE


def test_a_prefill_in_chunks_equals_transformers(oracle, make_pipeline, token_ids):
    pipeline, rows = make_pipeline(oracle.split()), []
    for start, end in itertools.pairwise((0, 5, 6, 14, len(token_ids))):
        rows.append(pipeline.logits(token_ids[start:end], [Segment(0, start, end - start)]))
    assert (torch.cat(rows) - oracle.logits(token_ids)).abs().max() <= TOLERANCE


def test_every_split_is_bitwise_equal_to_one_process(oracle, make_pipeline, token_ids):
    layers = range(1, oracle.config.num_layers)
    splits = [(at,) for at in layers] + list(itertools.combinations(layers, 2))
    expected_tokens, expected = make_pipeline(oracle.split()).greedy(token_ids, 16)
    for bounds in splits:
        tokens, logits = make_pipeline(oracle.split(*bounds)).greedy(token_ids, 16)
        assert tokens == expected_tokens, bounds
        assert torch.equal(logits, expected), bounds


def test_a_rerun_is_bitwise_equal(oracle, make_pipeline, token_ids):
    pipeline = make_pipeline(oracle.split(2))
    first = pipeline.greedy(token_ids, 8)
    for cache in pipeline.caches:
        cache.clear()
    second = pipeline.greedy(token_ids, 8)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_requests_side_by_side_equal_each_alone(oracle, make_pipeline, token_ids):
    """Rows of one product may round differently in company: 1e-4, and the same greedy tokens."""
    prompts = [token_ids[:9], token_ids[9:10], token_ids[10:]]
    alone = [make_pipeline(oracle.split()).greedy(prompt, 6) for prompt in prompts]
    pipeline = make_pipeline(oracle.split(1), num_slots=4)
    slots, rows, positions = (2, 0, 3), prompts, [0, 0, 0]
    for step in range(6):
        batch = [
            Segment(slot, position, len(row))
            for slot, position, row in zip(slots, positions, rows, strict=True)
        ]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        logits = pipeline.logits(torch.cat(rows), batch)[ends]
        expected = torch.stack([each[1][step] for each in alone])
        assert (logits - expected).abs().max() <= TOLERANCE
        assert logits.argmax(-1).tolist() == [each[0][step] for each in alone]
        positions = [at + len(row) for at, row in zip(positions, rows, strict=True)]
        rows = list(logits.argmax(-1).unsqueeze(1))


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


@pytest.fixture(scope="module")
def smollm2(smollm2_dir, oracle_class):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    return oracle_class(smollm2_dir, model.eval())


@pytest.fixture(scope="module")
def smollm2_exact(smollm2_dir, oracle_class):
    """In float64. In float32 the oracle's one pass and its own stepping differ by 1.2e-4, more than
    the tolerance, and are both farther from the exact logits than we are.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float64)
    return oracle_class(smollm2_dir, model.eval())


@pytest.fixture(scope="module")
def smollm2_prompts(smollm2_dir):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    return [torch.tensor(tokenizer.encode(prompt).ids) for prompt in PROMPTS]


def test_smollm2_agrees_with_transformers_for_64_tokens_on_20_prompts(
    smollm2_exact, smollm2_prompts, make_pipeline
):
    """One pass of the oracle over prompt and continuation gives the 64 rows that led to it."""
    whole = smollm2_exact.split()
    for prompt, prompt_ids in zip(PROMPTS, smollm2_prompts, strict=True):
        tokens, logits = make_pipeline(whole).greedy(prompt_ids, 64)
        rows = smollm2_exact.logits(torch.cat((prompt_ids, torch.tensor(tokens[:-1]))))
        expected = rows[len(prompt_ids) - 1 :]
        assert expected.argmax(-1).tolist() == tokens, prompt
        assert (logits - expected).abs().max() <= TOLERANCE, prompt


def test_smollm2_steps_as_transformers_in_float32_and_in_stages_bit_for_bit(
    smollm2, smollm2_prompts, make_pipeline
):
    whole, two, three = smollm2.split(), smollm2.split(15), smollm2.split(9, 21)
    for prompt_ids in smollm2_prompts[:3]:
        expected_tokens, expected = smollm2.greedy(prompt_ids, 64)
        tokens, logits = make_pipeline(whole).greedy(prompt_ids, 64)
        assert tokens == expected_tokens
        assert (logits - expected).abs().max() <= TOLERANCE
        for stages in (two, three):
            assert torch.equal(make_pipeline(stages).greedy(prompt_ids, 64)[1], logits)


def test_smollm2_knows_the_capital_of_france(smollm2, smollm2_dir, make_pipeline):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    prompt_ids = torch.tensor(tokenizer.encode(PROMPTS[0]).ids)
    tokens, _ = make_pipeline(smollm2.split()).greedy(prompt_ids, 4)
    assert "Paris" in tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def gpt2_shape(tmp_path_factory, oracle_class):
    """GPT-2's own configuration with random weights."""
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    directory: Path = tmp_path_factory.mktemp("gpt2-shape")
    model.save_pretrained(directory)
    yield oracle_class(directory, model)
    (directory / "model.safetensors").unlink()  # half a gigabyte


def test_gpt2_true_shape_agrees_with_transformers(gpt2_shape, make_pipeline):
    whole, split = gpt2_shape.split(), gpt2_shape.split(4, 8)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        prompt_ids = torch.randint(0, 50257, (12,), generator=generator)
        expected_tokens, expected = gpt2_shape.greedy(prompt_ids, 64)
        tokens, logits = make_pipeline(whole).greedy(prompt_ids, 64)
        assert tokens == expected_tokens
        assert (logits - expected).abs().max() <= TOLERANCE
        if seed == 0:
            assert torch.equal(make_pipeline(split).greedy(prompt_ids, 64)[1], logits)
