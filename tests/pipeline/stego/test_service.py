"""Messages come back from texts exactly, however the stages lie; whatever else gives an error."""

import re
import threading
from dataclasses import replace

import numpy as np
import pytest
import trio

from pipeline.stego.codecs import CODECS
from pipeline.stego.errors import StegoError
from pipeline.stego.fingerprint import Settings
from pipeline.stego.keys import Secret
from tests.pipeline.stego.conftest import LIMITS, MODEL

CUT_OFF = re.compile(r"carries \d+ of \d+ bits")


async def hidden(service, message, task):
    return (await service.hide(message, task)).text


@pytest.mark.parametrize("codec", CODECS)
async def test_twenty_texts_are_read_by_other_stages_and_in_another_batch(
    open_service, task, codec
):
    rng = np.random.default_rng(1)
    jobs = [
        (rng.bytes(rng.integers(1, 9)), task(settings=Settings(codec=codec, top_k=top_k)))
        for top_k in (50, 0)
        for _ in range(5)
    ]
    texts, found = {}, {}

    async def hide(service, i):
        texts[i] = await hidden(service, *jobs[i])

    async def find(service, i):
        found[i] = (await service.find(texts[i], jobs[i][1])).message

    async with open_service() as service, trio.open_nursery() as nursery:
        for i in range(len(jobs)):
            nursery.start_soon(hide, service, i)
    alone = replace(LIMITS, num_slots=1, chunk_tokens=5)
    async with open_service(1, 3, limits=alone) as service, trio.open_nursery() as nursery:
        for i in range(len(jobs)):
            nursery.start_soon(find, service, i)
    assert [found[i] for i in range(len(jobs))] == [message for message, _ in jobs]


async def test_a_text_is_written_and_what_it_took(service, task):
    heard = []
    written = await service.hide(b"hello", task(), heard.append)
    statistics = written.statistics
    assert len(statistics.steps) % 16 == 0
    assert statistics.num_bits == 8 * (36 + 5)
    assert heard[-1] == (8 * 41, 8 * 41)
    assert 0.5 < statistics.used < 1.1
    assert abs(sum(step.divergence for step in statistics.steps)) < 1e-6
    assert "tokens" in statistics.summary()


@pytest.mark.parametrize("ending", ["\n", "  ", "\r\n\r\n", " \t\n"])
async def test_whitespace_at_the_end_does_not_matter(service, task, ending):
    text = await hidden(service, b"hello", task())
    for changed in (text + ending, text.rstrip() + ending, text.rstrip()):
        assert (await service.find(changed, task())).message == b"hello"


class SpaceFirst:
    """A mask under which every text begins with a space."""

    def __init__(self, mask, space):
        self._mask = mask
        self._space = space

    def allowed(self, generated, vocab_size):
        allowed = self._mask.allowed(generated, vocab_size)
        return allowed if generated else (np.arange(vocab_size) == self._space) & allowed


async def test_a_space_lost_at_the_start_does_not_matter(
    service, task, cover_tokenizer, monkeypatch
):
    (space,) = cover_tokenizer.ids(" ")
    monkeypatch.setitem(vars(cover_tokenizer), "mask", SpaceFirst(cover_tokenizer.mask, space))
    text = "  "
    while text[1].isspace():  # where more is left, nobody can know that some is lost
        text = await hidden(service, b"a", task())
    assert text.startswith(" ")
    assert (await service.find(text[1:], task())).message == b"a"


@pytest.mark.parametrize("change", [
    {"secret": Secret(bytes(32))},
    {"settings": Settings(temperature=0.9)},
    {"settings": Settings(top_k=49)},
    {"settings": Settings(top_p=0.99)},
    {"prompt_ids": (1, 2, 3)},
], ids=["secret", "temperature", "top-k", "top-p", "prompt"])  # fmt: skip
async def test_another_secret_setting_or_prompt_gives_one_error(service, task, change):
    text = await hidden(service, b"hello", task())
    with pytest.raises(StegoError, match="wrong secret, model or settings, or altered text"):
        await service.find(text, task(**change))


@pytest.mark.parametrize("changes", [{"precision": "int8"}, {"kernels": "torch"}])
async def test_another_model_or_kernels_give_an_error_though_they_compute_alike(
    open_service, task, changes
):
    async with open_service() as service:
        text = await hidden(service, b"hello", task())
    async with open_service(model=MODEL.model_copy(update=changes)) as service:
        with pytest.raises(StegoError, match="wrong secret, model"):
            await service.find(text, task())


async def test_no_letter_can_be_changed_unseen(service, task):
    text = await hidden(service, b"hello", task())
    for place in range(0, len(text.rstrip()), 3):
        changed = text[:place] + ("x" if text[place] != "x" else "y") + text[place + 1 :]
        with pytest.raises(StegoError, match="altered text"):
            await service.find(changed, task())


@pytest.mark.parametrize("change", [
    lambda text: "", lambda text: " \n", lambda text: text[: len(text) // 2],
    lambda text: text.rstrip()[:-1], lambda text: text + "x", lambda text: text + text,
    lambda text: "something else that nobody has written", lambda text: "é" + text[1:],
    lambda text: text[:30] + "<|end|>" + text[30:],
])  # fmt: skip
async def test_a_text_that_is_cut_or_goes_on_gives_one_error(service, task, change):
    text = await hidden(service, b"hello", task())
    with pytest.raises(StegoError, match="altered text"):
        await service.find(change(text), task())


async def test_a_text_longer_than_the_context_is_refused_as_that(service, task):
    text = await hidden(service, b"hello", task())
    with pytest.raises(StegoError, match=r"context has room for \d+ beside"):
        await service.find(text * 50, task())


async def test_a_message_that_can_never_fit_is_refused_before_minutes_of_work(service, task):
    with pytest.raises(StegoError, match=r"carries 0 of \d+ bits: its \d+ tokens"):
        await service.hide(np.random.default_rng(0).bytes(1000), task())
    assert service._engine.stats.num_steps == 0


async def test_messages_of_no_length_and_too_much_are_refused(service, task):
    with pytest.raises(StegoError, match="empty"):
        await service.hide(b"", task())
    with pytest.raises(StegoError, match="at most"):
        await service.hide(bytes(100_000), task())


async def test_where_there_is_no_room_the_error_says_how_far_it_came(service, task):
    with pytest.raises(StegoError, match=CUT_OFF):
        await service.hide(b"hello", task(max_tokens=50))


async def test_a_continuation_without_entropy_ends_in_that_error(service, task):
    with pytest.raises(StegoError, match=CUT_OFF):
        await service.hide(b"a", task(settings=Settings(temperature=0.001)))


@pytest.mark.parametrize("settings", [Settings(temperature=0.0), Settings(top_k=1)])
async def test_settings_that_leave_one_token_are_refused(service, task, settings):
    with pytest.raises(StegoError, match="only the most likely token"):
        await service.hide(b"a", task(settings=settings))


async def test_a_codec_that_there_is_not_is_refused(service, task):
    with pytest.raises(StegoError, match="no codec 'morse'"):
        await service.hide(b"a", task(settings=Settings(codec="morse")))


async def test_torchs_kernels_write_and_read_alone(open_service, task):
    async with open_service(kernels="torch", is_row_exact=False) as service:
        text = await hidden(service, b"a", task())
    async with open_service(2, kernels="torch", is_row_exact=False) as service:
        assert (await service.find(text, task())).message == b"a"


async def test_kernels_without_exact_rows_take_one_at_a_time(open_service, task):
    async with open_service(is_row_exact=False) as service:
        errors = []

        async def hide():
            try:
                await service.hide(b"a", task())
            except StegoError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hide)
            nursery.start_soon(hide)
        assert "one at a time" in str(*errors)


async def test_texts_that_are_split_otherwise_are_written_again(open_service, task, monkeypatch):
    async with open_service() as service:
        with trio.fail_after(60):
            while True:  # until some pair of letters is said as two tokens
                written = await service.hide(b"four", task(settings=Settings(top_k=0)))
                if written.statistics.num_retries:
                    break
        monkeypatch.setattr("pipeline.stego.service.MAX_TRIES", 3)
        monkeypatch.setattr(service._tokenizer, "survives", lambda *_: False)
        with pytest.raises(StegoError, match="none of 3 texts"):
            await service.hide(b"a", task(settings=Settings(temperature=2.0)))


async def test_a_text_that_cannot_be_read_back_is_never_handed_out(service, task, monkeypatch):
    real = service._read

    async def read(*args):
        chooser = await real(*args)
        chooser.reader._phase = replace(chooser.reader._phase, message=b"other")
        return chooser

    monkeypatch.setattr(service, "_read", read)
    with pytest.raises(StegoError, match="do not compute the same twice"):
        await service.hide(b"a", task())


async def test_leaving_ends_the_generation(service, task):
    with trio.move_on_after(0.05):
        await service.hide(b"hello" * 10, task())
    await trio.testing.wait_all_tasks_blocked()
    assert service._engine.stats.num_running == 0
    assert service._num_open == 0


async def test_a_passphrase_is_stretched_in_another_thread(service, task, monkeypatch):
    threads = []
    real = Secret.keys

    def keys(self, salt):
        threads.append(threading.current_thread())
        return real(self, salt)

    monkeypatch.setattr(Secret, "keys", keys)
    by_passphrase = task(secret=Secret(passphrase=b"correct horse"))
    text = await hidden(service, b"hello", by_passphrase)
    assert len(threads) == 1  # to check the text, what is known is used
    assert (await service.find(text, by_passphrase)).message == b"hello"
    assert threading.main_thread() not in threads
    with pytest.raises(StegoError, match="wrong secret"):
        await service.find(text, task(secret=Secret(passphrase=b"wrong donkey")))
