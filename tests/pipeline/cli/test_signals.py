"""Leaving on a signal: in order on the first, at once on the second."""

import os
import signal

import pytest
import trio

from pipeline.cli.signals import run_until_signalled


async def signal_self(number):
    os.kill(os.getpid(), number)
    await trio.sleep_forever()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_goes_on_until_leaving_is_done(number):
    seen = []

    async def main():
        try:
            await signal_self(number)
        finally:
            seen.append("main ended")

    async def leave():
        await trio.sleep(0.01)
        seen.append("left")

    assert run_until_signalled(main, leave) == number
    assert seen == ["left", "main ended"]


def test_a_second_signal_does_not_wait():
    seen = []

    async def main():
        await signal_self(signal.SIGTERM)

    async def leave():
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()
        seen.append("left")

    assert run_until_signalled(main, leave) == signal.SIGTERM
    assert seen == []


def test_what_ends_while_leaving_ends_it():
    leaving = trio.Event()

    async def main():
        os.kill(os.getpid(), signal.SIGTERM)
        await leaving.wait()

    async def leave():
        leaving.set()
        await trio.sleep_forever()

    assert run_until_signalled(main, leave) == signal.SIGTERM


def test_a_signal_that_is_not_asked_for_has_its_own_effect():
    async def main():
        with pytest.raises(KeyboardInterrupt):
            await signal_self(signal.SIGINT)

    assert run_until_signalled(main, signals=(signal.SIGTERM,)) is None
