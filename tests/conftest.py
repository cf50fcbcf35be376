"""What several suites share: a tiny model, and how a relay tells where a record ends."""

import gc
import logging
import shutil
import signal
import sys
from contextlib import suppress

import pytest

# What is drawn is drawn alike in every run, and how long it takes fails nothing: scripts/fuzz_* and
# --hypothesis-profile=default look further. In the environment of clients it is not installed.
with suppress(ModuleNotFoundError):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "alike", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("alike")

# Whoever runs the tests in the background of a shell has this ignored, by all they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Nothing of ten thousand tests is garbage: looking for it is a sixth of what they take."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _own_garbage():
    """Garbage of one file's tests is collected once, and what they leave is not searched again.

    Whatever collects garbage, of tests or of the runtime, would go through all that ten thousand
    tests and their imports have left: a second each time, at the end.
    """
    gc.freeze()
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _drawn_alike():
    """What a test draws of torch is the same whichever ran before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logged_alike():
    """What is logged does not depend on which test ran before: commands say how much, for good."""
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


@pytest.fixture
async def passing_time(mock_clock, nursery):
    """Of `mock_clock`, which a test has to ask for: while nobody has anything to do, time passes.

    No deadline is missed on a busy machine, and none is waited for, where all that is done is
    done by this process's tasks: of its threads, and of others, nobody knows that they are busy.
    """
    import trio.testing

    async def go_on():
        while True:
            await trio.testing.wait_all_tasks_blocked(0.01)
            until_next = trio.lowlevel.current_statistics().seconds_to_next_deadline
            mock_clock.jump(max(0.0, min(until_next, 0.1)))

    nursery.start_soon(go_on)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random 4-layer Llama with a byte-level tokenizer, as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=255,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def text_model(tiny_model, tmp_path_factory):
    """The tiny model with tokens of printable letters, some pairs of which are tokens as well.

    What it says at random is text, and now and then a pair is said as two tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(tiny_model, directory)
    letters = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
    pairs = [(a, b) for a in "aeiou" for b in "bcdfnrst"]
    vocab = {token: i for i, token in enumerate([*letters, *map("".join, pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def read_unit():
    """Reads one handshake message, or one record, off a stream; None where that has ended."""

    async def exactly(source, num_bytes):
        data = b""
        while len(data) < num_bytes:
            piece = await source.receive_some(num_bytes - len(data))
            if not piece:
                return None
            data += piece
        return data

    async def read_unit(source, *, is_handshake):
        header = await exactly(source, 2 if is_handshake else 8)
        if header is None:
            return None
        size = int.from_bytes(header if is_handshake else header[4:], "big")
        body = await exactly(source, size)
        return None if body is None else header + body

    return read_unit
