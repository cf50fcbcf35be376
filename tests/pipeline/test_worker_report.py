"""What a supervised worker says on stdout, and how it is read."""

import os

import pytest

from pipeline.worker_report import (
    MAX_LINE_BYTES,
    Failed,
    Listening,
    Loaded,
    Reporter,
    parse_report,
    report_failure,
)


def test_what_is_told_is_what_is_read(capfd):
    reporter = Reporter()
    reporter.loaded(1, 1 << 40)
    reporter.listening("unix:/a b/c", "tcp:[::1]:5")
    report_failure("stage-worker", "m.json:\nno such  file", 2)
    lines = capfd.readouterr().out.encode().splitlines()
    there = Listening("unix:/a b/c", "tcp:[::1]:5")
    told = [Loaded(1, 1 << 40), there, Failed("m.json: no such file")]
    assert [parse_report(line) for line in lines] == told


def test_of_many_steps_few_are_told_and_the_last_always(capfd):
    reporter = Reporter()
    for done in range(100_001):
        reporter.loaded(done, 100_000)
    told = [parse_report(line.encode()) for line in capfd.readouterr().out.splitlines()]
    assert told[0] == (0, 100_000)
    assert told[-1] == (100_000, 100_000)
    assert len(told) < 20


@pytest.mark.parametrize(
    "line",
    [b"", b"ready", b"loaded", b"loaded 1", b"loaded a b", b"loaded -1 2", b"loaded 1 2 3",
     b"listening", b"listening now", b"\xff\xfe", b"loading 1 2"],
)  # fmt: skip
def test_any_other_line_is_none(line):
    assert parse_report(line) is None


def test_a_reason_of_any_length_is_a_line_of_a_bounded_one(capfd):
    report_failure("stage-worker", "é" * MAX_LINE_BYTES, 2)
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    assert isinstance(parse_report(out.encode()), Failed)


def test_nobody_who_reads_is_no_error(monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as stdout:  # noqa: PTH123 (a descriptor)
        monkeypatch.setattr("sys.stdout", stdout)
        Reporter().listening("tcp:h:1", "tcp:h:2")
