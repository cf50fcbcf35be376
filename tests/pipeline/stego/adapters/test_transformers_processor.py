"""With a real model that transformers generates with."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from pipeline.sampling.params import SamplingParams
from pipeline.stego.adapters.conditional import Conditioning, conditional
from pipeline.stego.adapters.encoder import Replay, StegoEncoder
from pipeline.stego.adapters.request import StegoRequest
from pipeline.stego.adapters.transformers_processor import (
    StegoLogitsProcessor,
    TransformersEngine,
)
from pipeline.stego.cover import CoverReader
from pipeline.stego.errors import StegoError
from pipeline.stego.range_coding import RangeCodec
from tests.pipeline.stego.adapters.toys import CONTEXT, END, HOW, LETTERS, SECRET, new_request

PROMPT = "Dear all"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of a model so small, threads take five times as long to meet as to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"<end>": END}
    spelled = Tokenizer(models.BPE(vocabulary, []))
    spelled.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=spelled, eos_token="<end>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=END, bos_token_id=None,
        pad_token_id=END, initializer_range=0.6,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("top_k", [0, 12])
def test_a_message_goes_through_text_and_back(model, tokenizer, top_k):
    how = Conditioning(SamplingParams(temperature=1.2, top_k=top_k, top_p=0.97))
    encoder = StegoEncoder(TransformersEngine(model, tokenizer), SECRET, "range", how)
    text = encoder.encode("at nine", PROMPT)
    assert encoder.decode(text, PROMPT) == b"at nine"
    assert encoder.encode("at nine", PROMPT) != text


def test_generation_ends_where_the_text_is_whole(model, tokenizer):
    request = new_request(b"x")
    ids = TransformersEngine(model, tokenizer).generate(tokenizer.encode(PROMPT), request, 900)
    assert tuple(ids) == (*request.result(), END)


def test_rows_of_a_batch_carry_a_message_each_and_end_when_theirs_do(model, tokenizer):
    messages = [b"a", bytes(range(110)), bytes(range(55))]  # which nothing compresses
    requests = [new_request(message) for message in messages]
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids

    def generate(batch):
        return model.generate(
            prompt.repeat(3, 1),
            attention_mask=torch.ones(3, prompt.shape[1], dtype=torch.long),
            logits_processor=[StegoLogitsProcessor(batch)],
            max_new_tokens=2000,
            do_sample=True,
        )

    output = generate(requests)
    for row, request in zip(output[:, prompt.shape[1] :].tolist(), requests, strict=True):
        token_ids = request.result()
        assert tuple(row[: len(token_ids)]) == token_ids
        assert set(row[len(token_ids) :]) <= {END}
    readers = [CoverReader(SECRET, RangeCodec(), CONTEXT) for _ in requests]
    replays = [
        StegoRequest(Replay(request.result(), reader), HOW, END)
        for request, reader in zip(requests, readers, strict=True)
    ]
    generate(replays)
    assert [reader.message for reader in readers] == messages
    lengths = [len(request.result()) for request in requests]
    assert lengths[0] < lengths[2] < lengths[1]


def test_scores_are_left_as_they_are_and_new_ones_leave_one_token():
    scores = torch.randn(2, END + 1)
    before = scores.clone()
    processor = StegoLogitsProcessor([new_request(), new_request()])
    forced = processor(torch.tensor([[1, 2], [3, 4]]), scores)
    assert torch.equal(scores, before)
    assert torch.isfinite(forced).sum(dim=1).tolist() == [1, 1]
    allowed = conditional(scores[0], Conditioning()).ids.tolist()
    assert int(forced[0].argmax()) in allowed


def test_beams_are_refused(model, tokenizer):
    with pytest.raises(StegoError, match="beam search"):
        model.generate(
            torch.tensor([tokenizer.encode(PROMPT)]),
            logits_processor=[StegoLogitsProcessor([new_request()])],
            num_beams=2,
            max_new_tokens=4,
        )


def test_speculation_is_found_out(model, tokenizer):
    """Prompt look-up drafts tokens and calls the processor for several positions at once."""
    prompt = "abc abc abc abc abc abc"
    request = new_request()
    model.generate(
        torch.tensor([tokenizer.encode(prompt)]),
        logits_processor=[StegoLogitsProcessor([request])],
        prompt_lookup_num_tokens=3,
        max_new_tokens=200,
        do_sample=False,
    )
    with pytest.raises(StegoError, match="speculation"):
        request.result()


def test_continuous_batching_drops_the_processor():
    processors = LogitsProcessorList([StegoLogitsProcessor([new_request()])])
    kept = ContinuousBatchingLogitsProcessorList(processors)
    assert len(kept.logits_processor) == 0


def test_a_model_without_an_end_is_refused(model, tokenizer):
    class Endless:
        generation_config = type("Config", (), {"eos_token_id": None})

    tokens = type("Tokens", (), {"eos_token_id": None})
    with pytest.raises(StegoError, match="ends a text"):
        TransformersEngine(Endless(), tokens())
