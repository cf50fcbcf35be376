"""Each family against transformers, every split of it, and requests side by side."""

from copy import deepcopy

import pytest
import torch

from pipeline.protocol.batch import Segment
from tests.pipeline.models.family_models import CASES, FAMILIES, make_model
from tests.pipeline.oracles import Oracle, randomise

NUM_TOKENS = 32
TOLERANCE = 1e-4
# Models that kernels take for tests of what does not depend on how one is configured.
FIRST = [f"{family}-0" for family in FAMILIES]


@pytest.fixture(scope="module")
def make_case(tmp_path_factory):
    made = {}

    def get(case):
        if case not in made:
            torch.manual_seed(0)
            model = randomise(make_model(case))
            directory = tmp_path_factory.mktemp(case)
            model.save_pretrained(directory)
            made[case] = Oracle(directory, model)
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers_in_every_split(
    make_case, make_pipeline, token_ids, kernels, case
):
    own = make_case(case).computing_with(kernels)
    tokens, logits = make_pipeline(own.split()).greedy(token_ids, NUM_TOKENS)
    # which would say the same, one after another, where each is what it says behind the others
    text = torch.cat([token_ids, torch.tensor(tokens)])
    expected = own.logits(text)[len(token_ids) - 1 : -1]
    assert tokens == expected.argmax(-1).tolist()
    assert (logits - expected).abs().max() <= TOLERANCE
    are_all_split = kernels != "torch" or case in FIRST  # how rows are cut is no configuration's
    for at in range(1, own.config.num_layers if are_all_split else 1):
        split = make_pipeline(own.split(at)).greedy(token_ids, NUM_TOKENS)
        assert split[0] == tokens, at
        assert torch.equal(split[1], logits), at


def side_by_side(pipeline, prompts, num_tokens):
    """Logits of each token of each request, all of them in one batch."""
    rows, positions, found = list(prompts), [0] * len(prompts), []
    for _ in range(num_tokens):
        batch = [
            Segment(slot, position, len(row))
            for slot, (position, row) in enumerate(zip(positions, rows, strict=True))
        ]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        found.append(pipeline.logits(torch.cat(rows), batch)[ends])
        positions = [at + len(row) for at, row in zip(positions, rows, strict=True)]
        rows = list(found[-1].argmax(-1).unsqueeze(1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("case", FIRST)
def test_requests_side_by_side_are_each_alone(make_case, make_pipeline, token_ids, kernels, case):
    """With native kernels bit for bit: which experts a neighbour meets is nothing to a row."""
    shards = make_case(case).computing_with(kernels).split(1)
    prompts = [token_ids[:9], token_ids[9:10], token_ids[10:]]
    together = side_by_side(make_pipeline(shards, num_slots=3), prompts, 4)
    for prompt, logits in zip(prompts, together, strict=True):
        (alone,) = side_by_side(make_pipeline(shards), [prompt], 4)
        if shards[0].is_row_exact:
            assert torch.equal(logits, alone)
        assert (logits - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", FIRST)
def test_a_recorded_step_gives_the_bits_of_the_calls_one_by_one(
    make_case, make_pipeline, token_ids, native, case
):
    (shard,) = make_case(case).computing_with(native).split()
    if not shard.has_decode_steps:
        pytest.skip("which experts rows meet cannot be recorded")
    recorded, plain = make_pipeline([shard]), make_pipeline([shard])
    for pipeline in (recorded, plain):
        pipeline.hidden(token_ids, [Segment(0, 0, len(token_ids))])
    token = token_ids[:1]
    for position in range(len(token_ids), len(token_ids) + 4):
        batch = [Segment(0, position, 1)]
        rows = memoryview(token.to(torch.int32).numpy()).cast("B")
        chosen, logits = shard.decode(rows, batch, recorded.caches[0])
        expected = plain.logits(token, batch)
        assert torch.equal(torch.from_numpy(logits), expected)
        token = torch.frombuffer(chosen, dtype=torch.int32).to(torch.int64)
        assert int(token) == int(expected.argmax())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("case", ["gemma3_text-0", "qwen3_moe-0", "phi3-0", "gpt_oss-0"])
def test_in_fewer_bits_the_kernels_agree(make_case, make_pipeline, token_ids, native, case, dtype):
    """The same rounded weights: what differs is how rows are rounded on their way.

    For a few rows that makes a router choose another expert.
    """
    batch = [Segment(0, 0, len(token_ids))]
    found = [
        make_pipeline(make_case(case).computing_with(each).split(1, dtype=dtype)).logits(
            token_ids, batch
        )
        for each in ("torch", native)
    ]
    of_rows = [torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(*found, strict=True)]
    assert torch.stack(of_rows).median() > 0.99


def test_a_session_that_is_short_turns_heads_as_the_model_was_made(
    make_case, make_pipeline, token_ids, kernels
):
    """LongRoPE: transformers takes its short factors up to the original length, here 32."""
    own = make_case("phi3-2").computing_with(kernels)
    prompt, batch = token_ids[:20], [Segment(0, 0, 20)]
    expected = own.logits(prompt)
    short = make_pipeline(own.split(1), max_seq=32).logits(prompt, batch)
    longer = make_pipeline(own.split(1), max_seq=64).logits(prompt, batch)
    assert (short - expected).abs().max() <= TOLERANCE
    assert (longer - expected).abs().max() > 100 * TOLERANCE


def test_a_models_configuration_is_not_what_another_was_made_of():
    """Else what a family's reference adds to it would be in models that are made later."""
    before = deepcopy(FAMILIES)
    for case in CASES:
        make_model(case)
    assert before == FAMILIES
