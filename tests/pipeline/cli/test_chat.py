"""A conversation in the terminal: what is remembered of it, and how it is interrupted."""

import os
import signal
from queue import SimpleQueue

import pytest
import trio

from pipeline.cli.chat import Background, Conversation, _heard, _interrupted_by, _lines
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.errors import PromptError, RequestTimedOut, SessionError
from pipeline.sampling.params import SamplingParams

GENERATION = Generation((1, 2), 4, frozenset(), SamplingParams())


class Bytes:
    """A tokenizer and a template: a token a byte, a message a line."""

    def encode_rendered(self, text):
        return tuple(text.encode())

    def render(self, messages):
        return "".join(f"{each['role'][0]}:{each['content']}\n" for each in messages)


def conversation(room=100, system=None):
    return Conversation(Bytes(), Bytes(), room, system)


def text(prompt_ids):
    return bytes(prompt_ids).decode()


def test_a_question_comes_with_all_that_was_said_before():
    talk = conversation(system="Be brief.")
    talk.ask("Hi")
    talk.answer("Hello")
    prompt_ids, num_forgotten = talk.ask("Bye")
    assert text(prompt_ids) == "s:Be brief.\nu:Hi\na:Hello\nu:Bye\n"
    assert num_forgotten == 0


def test_a_question_that_got_no_answer_is_no_part_of_the_next():
    talk = conversation()
    talk.ask("Hi")
    talk.answer("")
    assert text(talk.ask("Bye")[0]) == "u:Bye\n"


def test_the_oldest_questions_go_with_their_answers_where_room_ends():
    talk = conversation(room=30, system="S")
    for number in range(3):
        talk.ask(f"ask{number}")
        talk.answer("yes")
    prompt_ids, num_forgotten = talk.ask("ask3")
    assert text(prompt_ids) == "s:S\nu:ask2\na:yes\nu:ask3\n"
    assert num_forgotten == 2  # the ones before went when they had to


def test_what_can_never_fit_is_refused_and_nothing_is_forgotten():
    talk = conversation(room=20)
    talk.ask("Hi")
    talk.answer("Hello")
    with pytest.raises(PromptError, match="room for 19"):
        talk.ask("x" * 20)
    assert text(talk.ask("Bye")[0]) == "u:Hi\na:Hello\nu:Bye\n"


def test_leaving_ends_what_runs_behind():
    ended = []

    async def run():
        background.is_settled.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.append(True)

    background = Background(PipelineEngine(Limits(1, 16)), run)
    with background:
        background.is_settled.wait(300)
        background.check()
    assert ended


def test_whoever_waits_or_asks_later_hears_why_the_pipeline_has_failed():
    goes_on, heard = trio.Event(), []

    async def run():
        background.is_settled.set()
        await goes_on.wait()
        raise SessionError("stage 1 is lost")

    background = Background(PipelineEngine(Limits(1, 16)), run)
    with background:
        background.is_settled.wait(300)
        background.submit(GENERATION, heard.append)
        background._call(goes_on.set)
        background._thread.join(300)
        with pytest.raises(SessionError, match="stage 1 is lost"):
            background.submit(GENERATION, heard.append)
    assert [str(event) for event in heard] == ["stage 1 is lost"]


def test_a_pipeline_that_never_stands_is_told():
    async def run():
        raise SessionError("gave up on stage 0")

    background = Background(PipelineEngine(Limits(1, 16)), run)
    with background:
        assert background.is_settled.wait(300)
        with pytest.raises(SessionError, match="gave up on stage 0"):
            background.check()


def test_ctrl_c_is_a_call_meanwhile_and_what_it_was_afterwards():
    before, calls = signal.getsignal(signal.SIGINT), []
    with _interrupted_by(lambda: calls.append(True)):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert calls
    assert signal.getsignal(signal.SIGINT) is before


def typed(monkeypatch, *lines, is_terminal):
    """Have `input` give these, one after another; exceptions are raised."""
    left = iter(lines)

    def read(prompt):
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    return _lines()


def test_ctrl_c_takes_a_line_back_and_ctrl_d_ends(monkeypatch, capsys):
    lines = typed(monkeypatch, "a", KeyboardInterrupt(), "b", EOFError(), is_terminal=True)
    assert list(lines) == ["a", "b"]


def test_a_pipes_reader_is_interrupted_as_any_command(monkeypatch):
    lines = typed(monkeypatch, "a", KeyboardInterrupt(), is_terminal=False)
    assert next(lines) == "a"
    with pytest.raises(KeyboardInterrupt):
        next(lines)


@pytest.mark.parametrize("line", ["\udcff", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")])
def test_lines_that_are_no_text_are_refused(monkeypatch, line):
    with pytest.raises(PromptError, match="UTF-8"):
        next(typed(monkeypatch, line, is_terminal=False))


def test_an_answer_has_the_time_that_a_request_may_take_and_no_more():
    events = SimpleQueue()
    for event in ("a", "b", None, "c"):
        events.put(event)
    assert list(_heard(events, None)) == ["a", "b"]
    rest = _heard(events, 0.05)
    assert next(rest) == "c"
    with pytest.raises(RequestTimedOut, match=r"0\.05 s"):
        next(rest)
