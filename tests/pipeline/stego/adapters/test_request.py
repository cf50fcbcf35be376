import pytest
import torch

from pipeline.stego.adapters.request import StegoRequest
from pipeline.stego.errors import StegoError
from tests.pipeline.stego.adapters.toys import (
    END,
    HOW,
    PROMPT,
    ToyEngine,
    is_forced,
    new_request,
    read,
    toy_logits,
)  # fmt: skip


def test_the_tokens_that_are_forced_carry_the_message():
    request = new_request(b"hello")
    generated = ToyEngine().generate(PROMPT, request, 500)
    token_ids = request.result()
    assert tuple(generated) == (*token_ids, END)
    assert read(token_ids) == b"hello"
    assert request.is_over


def test_after_the_text_only_its_end_is_forced():
    request = new_request()
    ToyEngine().generate(PROMPT, request, 500)
    before = request.result()
    logits = toy_logits(PROMPT)
    request.step(logits, 12345)
    assert is_forced(logits) == END
    assert request.result() == before


@pytest.mark.parametrize(("num_taken", "last"), [(0, None), (2, None), (1, 999)])
def test_an_engine_that_has_taken_other_tokens_is_found_out(num_taken, last):
    request = new_request()
    request.step(toy_logits(PROMPT), 0)
    logits = toy_logits(PROMPT)
    request.step(logits, num_taken, last)
    assert is_forced(logits) == END
    with pytest.raises(StegoError, match="speculation"):
        request.result()


def test_an_engine_that_stops_early_is_told_how_much_the_text_carries():
    request = new_request()
    ToyEngine().generate(PROMPT, request, 10)
    with pytest.raises(StegoError, match=r"after 10 tokens, which carry \d\d bits"):
        request.result()


def test_logits_that_are_no_numbers_end_the_text_and_not_the_engine():
    request = new_request()
    logits = torch.full((END + 1,), torch.nan)
    request.step(logits, 0)
    assert is_forced(logits) == END
    with pytest.raises(StegoError, match="no numbers"):
        request.result()


def test_of_several_errors_the_first_counts():
    request = StegoRequest(object(), HOW, END)
    request.fail(StegoError("first"))
    request.fail(StegoError("second"))
    with pytest.raises(StegoError, match="first"):
        request.result()


@pytest.mark.parametrize("end_token_id", [-1, END + 1, 1 << 70])
def test_without_a_token_to_end_with_logits_are_left_alone(end_token_id):
    request = StegoRequest(object(), HOW, end_token_id)
    logits = toy_logits(PROMPT)
    request.step(logits, 0)
    assert torch.equal(logits, toy_logits(PROMPT))
    with pytest.raises(StegoError, match="to end a text with"):
        request.result()
