"""Log lines: one line whatever is in them, and as JSON the keys the call gave them."""

import json
import logging

import pytest

from pipeline.cli.logs import (
    MAX_SHOWN,
    JsonFormatter,
    TextFormatter,
    held_back,
    printable,
    tell,
)


def record(message, *args, level=logging.INFO, **changes):
    made = logging.LogRecord("pipeline.x", level, __file__, 1, message, args, None)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def as_json(message, *args, **changes):
    line = JsonFormatter().format(record(message, *args, **changes))
    assert "\n" not in line
    return json.loads(line)


def test_every_key_of_a_message_is_a_key_of_its_own_with_its_type():
    line = as_json(
        "event=request request_id=%s status=%d ttft_ms=%s total_ms=%.2f ok=%s none=%s hex=%x",
        "ab12", 200, 1.5, 2.345, True, None, 255,
        created=1.25,
    )  # fmt: skip
    assert line == {
        "time": "1970-01-01T00:00:01.250Z",
        "level": "info",
        "logger": "pipeline.x",
        "event": "request",
        "request_id": "ab12",
        "status": 200,
        "ttft_ms": 1.5,
        "total_ms": 2.35,
        "ok": True,
        "none": None,
        "hex": "ff",
    }


def test_a_value_can_neither_end_early_nor_pretend_to_be_a_key():
    line = as_json("event=failed error=%s code=%d", 'x" code=7 level=\n{"a"', 2)
    assert line["error"] == 'x" code=7 level= {"a"'
    assert line["code"] == 2
    assert line["level"] == "info"


def test_words_without_a_key_are_the_message():
    line = as_json("event=development_mode %s and 100%% %s", "no privacy", 7)
    assert (line["event"], line["message"]) == ("development_mode", "no privacy and 100% 7")
    assert as_json("layers=%d-%d", 3, 5)["layers"] == "3-5"


def test_a_message_cannot_replace_where_and_when_it_was_written():
    line = as_json("time=%s level=%s logger=%s event=x", 1, 2, 3, level=logging.WARNING)
    assert (line["level"], line["logger"]) == ("warning", "pipeline.x")
    assert line["time"] != 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\x1b[31m\u2028", b"\xff", "é"])
def test_any_value_is_strict_json_on_one_line(value):
    line = JsonFormatter().format(record("event=x value=%s", value))
    assert json.loads(line, parse_constant=pytest.fail)["event"] == "x"
    assert line.isascii()
    assert line.isprintable()


def test_other_peoples_messages_stay_whole():
    assert as_json("Task %(name)s", {"name": "a b"})["message"] == "Task a b"
    assert as_json(ValueError("no text"))["message"] == "no text"


def test_exceptions_are_a_field_and_not_more_lines():
    try:
        raise ValueError("x")
    except ValueError as error:
        line = as_json("event=x", exc_info=(type(error), error, error.__traceback__))
    assert "ValueError" in line["exception"]


def test_text_is_one_line_without_control_characters():
    line = TextFormatter().format(record("event=x error=%s", "a\nlevel=ERROR\x1b[2J"))
    assert line.isprintable()
    assert "event=x error=a level=ERROR" in line


def test_text_from_elsewhere_cannot_drive_the_terminal():
    forged = "peer said\x1b]0;owned\x07\r\npipeline-orch: error: \u202e\udcff\x9b"
    shown = printable(forged)
    assert shown == r"peer said\x1b]0;owned\x07 pipeline-orch: error: \u202e\udcff\x9b"
    assert shown.isprintable()
    assert len(printable("x\x1b" * 10**6)) <= MAX_SHOWN + 1


def fail_while_held_back(root):
    with held_back():
        root.error("four")
        raise ValueError("x")


def test_what_is_held_back_comes_in_order_at_a_good_end_and_never_at_a_bad_one(monkeypatch, capfd):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(root, "level", logging.INFO)
    with held_back():
        root.info("one")
        root.error("two")
        assert capfd.readouterr().err == ""
    root.info("three")
    assert capfd.readouterr().err == "one\ntwo\nthree\n"
    with pytest.raises(ValueError, match="x"):
        fail_while_held_back(root)
    root.info("five")
    assert capfd.readouterr().err == "five\n"


def test_what_every_line_has_to_say_is_in_log_lines_and_in_lines_for_the_user(
    monkeypatch, capsys, caplog
):
    marks = {"measurements": "ignored"}
    assert " measurements=ignored event=x" in TextFormatter(marks).format(record("event=x"))
    line = json.loads(JsonFormatter(marks).format(record("event=x measurements=%s", "compared")))
    assert (line["event"], line["measurements"]) == ("x", "ignored")
    for handler in (logging.StreamHandler(), logging.NullHandler()):
        handler.setFormatter(TextFormatter(marks))
        monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
        tell("latency", "7 ms")
        assert capsys.readouterr().err == "latency: measurements=ignored 7 ms\n"
