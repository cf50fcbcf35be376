"""The load tool against a server whose figures are known."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import trio

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "bench_serve.py"


@pytest.fixture
def key(tmp_path):
    key = tmp_path / "key"
    key.write_text("sk-test-0123456789\n")
    return key


@pytest.fixture
def bench_script(key):
    """Runs the script as a user does: (exit code, stdout, stderr)."""

    async def run(url, *arguments):
        command = [sys.executable, SCRIPT, "--url", url, "--api-key-file", key, *arguments]
        done = await trio.run_process(
            [str(word) for word in command], capture_stdout=True, capture_stderr=True, check=False
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return run


@pytest.fixture
def bench(key, monkeypatch, capsys):
    """Runs the script in this process: (exit code, stdout, stderr)."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_serve

    def main():
        with pytest.raises(SystemExit) as caught:
            bench_serve.main()
        return caught.value.code

    async def run(url, *arguments, key_file=key):
        words = ["bench_serve.py", "--url", url, "--api-key-file", key_file, *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        capsys.readouterr()
        return (await trio.to_thread.run_sync(main), *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("arrivals", "api"),
    [(("--clients", 4), ()), (("--rate", 50), ("--chat",))],
    ids=["clients' completions", "chats at a rate"],
)
async def test_it_counts_tokens_and_measures_what_lies_between(
    start_gateway, make_engine, bench_script, tmp_path, arrivals, api
):
    engine = make_engine(seconds=0.02, repeats=True)
    out = tmp_path / "out.json"
    async with start_gateway(engine) as gateway:
        code, shown, err = await bench_script(
            gateway.url, *arrivals, *api, "--requests", 6, "--max-tokens", "5,10", "--seed", 3,
            "--warmup", 1, "--prompt-tokens", "3-9", "--json", out,
        )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out.read_text())
    asked = [generation.max_tokens for generation in engine.generations[1:]]
    assert sorted(set(asked)) == [5, 10]
    summary = found["summary"]
    assert (summary["requests"], summary["failed"]) == (6, 0)
    assert summary["output_tokens"] == sum(asked)
    prompts = [len(generation.prompt_ids) for generation in engine.generations[1:]]
    assert summary["prompt_tokens"] == sum(prompts)
    assert len(found["requests"]) == 6
    between = [each["inter_token"] for each in found["requests"]]
    shown_ms = summary["inter_token_ms"]
    lowest, highest = (1000 * of(itertools.chain(*between)) for of in (min, max))
    assert lowest <= shown_ms["p50"] <= shown_ms["p99"] <= highest
    seconds = sum(each["ttft"] + sum(each["inter_token"]) for each in found["requests"])
    assert seconds >= 0.02 * sum(count - 1 for count in asked)
    assert f"{sum(asked)} generated tokens" in shown


async def test_the_seed_alone_decides_what_is_asked(start_gateway, make_engine, bench):
    asked = []
    for seed in (1, 1, 2):
        engine = make_engine()
        async with start_gateway(engine) as gateway:
            options = ("--requests", 3, "--clients", 1, "--prompt-tokens", "5-40", "--seed", seed)
            assert (await bench(gateway.url, *options))[0] == 0
        asked.append([generation.prompt_ids for generation in engine.generations])
    assert asked[0] == asked[1] != asked[2]


async def test_failures_are_counted_by_kind_and_in_the_exit_code(start_gateway, bench):
    async with start_gateway(max_body_bytes=300) as gateway:
        code, shown, err = await bench(gateway.url, "--requests", 4, "--prompt-tokens", "500")
    assert (code, err) == (1, "")
    assert "failed 4 x HTTP 413 request_too_large" in shown
    assert "0 of 4 requests" in shown


async def test_a_stream_that_breaks_off_is_a_failure(start_gateway, make_engine, bench):
    async with start_gateway(make_engine(repeats=True, fail_at=3)) as gateway:
        code, shown, _ = await bench(gateway.url, "--requests", 2)
    assert code == 1
    assert "failed 2 x error event pipeline_unavailable" in shown


async def test_what_makes_measuring_impossible_is_one_line(start_gateway, bench, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("sk-wrong")
    async with start_gateway() as gateway:
        runs = [
            (await bench(gateway.url, key_file=wrong), "--api-key-file"),
            (await bench(gateway.url, key_file=tmp_path / "none"), "cannot read"),
            (await bench(gateway.url, "--requests", 1, "--json", "/nowhere/x"), "/nowhere/x"),
            (await bench("http://127.0.0.1:1"), "no answer from http://127.0.0.1:1"),
            (await bench("ftp://x"), "--url ftp://x"),
        ]
    for (code, _, err), word in runs:
        assert code == 2
        assert err.startswith("bench_serve: error: ")
        assert word in err
        assert err.count("\n") == 1


async def test_what_answers_without_http_is_named(bench):
    async def talk(stream):
        await stream.send_all(b"SSH-2.0-OpenSSH\r\n")
        await stream.receive_some()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, talk, 0)
        port = listeners[0].socket.getsockname()[1]
        code, _, err = await bench(f"http://127.0.0.1:{port}")
        nursery.cancel_scope.cancel()
    assert (code, err.count("\n")) == (2, 1)
    assert "no whole HTTP answer" in err


def test_lengths_that_are_none_are_refused(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_serve

    for value in ("0", "9-3", "x", "-1", "3-", "1,0"):
        monkeypatch.setattr(sys, "argv", ["bench_serve.py", f"--max-tokens={value}"])
        with pytest.raises(SystemExit) as caught:
            bench_serve.parse_arguments()
        assert caught.value.code == 2
        assert "give 64, or 16,64,256, or 16-256" in capsys.readouterr().err


async def test_a_picture_is_drawn_or_the_missing_package_named(
    start_gateway, make_engine, bench_script, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib", reason="the optional dependency of pictures")
    path = tmp_path / "x.png"
    async with start_gateway(make_engine(repeats=True)) as gateway:
        code, _, err = await bench_script(gateway.url, "--requests", 2, "--plot", path)
        assert code == 0, err
        assert path.read_bytes().startswith(b"\x89PNG")
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        (hidden / "matplotlib.py").write_text("raise ImportError")
        before = [entry for entry in sys.path if entry]
        monkeypatch.setenv("PYTHONPATH", ":".join([str(hidden), *before]))
        code, _, err = await bench_script(gateway.url, "--requests", 2, "--plot", path)
    assert (code, err.count("\n")) == (2, 1)
    assert "veilpipe[bench]" in err
