"""Real processes: the text is right, the same for every split, and nothing is left behind."""

import json
import signal
import time

import pytest


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never happened")


def expected_text(model_dir, prompt, num_tokens):
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("stages", [1, 3])
def test_a_pipeline_generates_what_one_reference_process_does(cluster, stages):
    cluster.plan(stages)
    for idx in range(stages):
        cluster.start_worker(idx)
    out = cluster.directory / "latency.json"
    result = cluster.orch("Hello there", "--max-tokens", "30", "--latency-out", out, "--ignore-eos")
    assert result.returncode == 0, result.stderr
    record = json.loads(out.read_text())
    assert record["token_ids"] == expected_text(cluster.model_dir, "Hello there", 30)
    assert result.stdout.startswith("Hello there")
    assert len(record["latencies_ms"]) == record["generation_tokens"] == 30
    assert record["latencies_ms"][0] == record["prompt_ms"] > 0
    assert record["finish_reason"] == "length"
    assert [len(token) for token in record["stages"]] == [stages] * 30
    for token in record["stages"]:
        assert all(timing["compute_ms"] > 0 and timing["wire_ms"] > 0 for timing in token)
    assert "tokens/s" in result.stderr


@pytest.mark.parametrize("wire", ["I8", pytest.param("BF16", marks=pytest.mark.slow)])
def test_stages_agree_on_smaller_activations_and_say_the_same_twice(cluster, wire):
    cluster.plan(3, wire_dtype=wire)
    for idx in range(3):
        cluster.start_worker(idx)
    out = cluster.directory / "latency.json"
    found = []
    for _ in range(2):
        result = cluster.orch("Hello", "--max-tokens", "12", "--latency-out", out, "--ignore-eos")
        assert result.returncode == 0, result.stderr
        found.append(json.loads(out.read_text())["token_ids"])
    assert found[0] == found[1]
    # The first tokens of a random model survive what is lost on the way.
    assert found[0][:2] == expected_text(cluster.model_dir, "Hello", 12)[:2]


def test_a_prompt_is_sampled_as_told(cluster):
    cluster.plan(2)
    cluster.start_worker(0)
    cluster.start_worker(1)
    out = cluster.directory / "latency.json"

    def generate(*flags):
        result = cluster.orch("Hi", "--max-tokens", "24", "--ignore-eos", "--latency-out", out,
                              *flags)  # fmt: skip
        assert result.returncode == 0, result.stderr
        return json.loads(out.read_text())["token_ids"], result.stdout

    greedy = expected_text(cluster.model_dir, "Hi", 24)
    drawn = ("--temperature", "1.5", "--seed", "7")
    tokens, text = generate(*drawn)
    assert generate(*drawn) == (tokens, text)
    assert tokens not in (greedy, generate("--temperature", "1.5", "--seed", "8")[0])
    assert generate(*drawn, "--top-k", "1")[0] == greedy
    assert generate(*drawn, "--chooser", "greedy")[0] == greedy
    mirostat = generate(*drawn, "--chooser", "mirostat:tau=5,eta=0.5")[0]
    assert mirostat not in (greedy, tokens)
    # A stop string ends the text in front of it, and the tokens soon after.
    stop = text[len("Hi") :].strip()[3:6]
    cut_tokens, cut = generate(*drawn, "--stop", "never in it", "--stop", stop)
    assert cut == text[: text.index(stop, len("Hi"))] + "\n"
    assert cut_tokens == tokens[: len(cut_tokens)]
    assert len(cut_tokens) < 24


def test_a_worker_serves_one_orchestrator_after_another(cluster):
    cluster.plan(2)
    cluster.start_worker(0)
    cluster.start_worker(1)
    runs = [cluster.orch("Same prompt", "--max-tokens", "12") for _ in range(3)]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len({run.stdout for run in runs}) == 1


def test_once_ends_the_workers_with_the_first_session(cluster):
    cluster.plan(2)
    workers = [cluster.start_worker(idx, "--once") for idx in range(2)]
    assert cluster.orch("Hi", "--max-tokens", "3").returncode == 0
    assert [worker.wait(300) for worker in workers] == [0, 0]


def test_addresses_can_be_overridden_so_that_a_relay_can_sit_between(cluster):
    cluster.plan(2)
    port = cluster.base_port
    # Stage 0 sends to an address the manifest does not know, where stage 1 listens.
    cluster.start_worker(0, "--data-out-target", f"127.0.0.1:{port + 15}")
    cluster.start_worker(1, "--data-in-listen", f"127.0.0.1:{port + 15}",
                         "--data-out-target", f"127.0.0.1:{port + 16}")  # fmt: skip
    result = cluster.orch("Hi", "--max-tokens", "3", "--data-out-listen", f"127.0.0.1:{port + 16}")
    assert result.returncode == 0, result.stderr


def test_a_second_orchestrator_is_told_that_the_stage_is_busy(cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    first = cluster.start_orch("Hi", "--max-tokens", "4000", "--ignore-eos")
    first.stdout.read(20)
    first.send_signal(signal.SIGSTOP)  # its session stays open while the second one asks
    second = cluster.orch("Hi", "--data-out-listen", "127.0.0.1:0", "--max-tokens", "3")
    assert second.returncode == 1
    assert "another orchestrator is connected" in second.stderr
    first.send_signal(signal.SIGCONT)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=300)
    assert first.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_every_process(cluster, number):
    cluster.plan(2)
    workers = [cluster.start_worker(idx) for idx in range(2)]
    orch = cluster.start_orch("Hi", "--max-tokens", "4000", "--ignore-eos")
    orch.stdout.read(20)
    for process in (orch, *workers):
        process.send_signal(number)
    _, err = orch.communicate(timeout=300)
    assert orch.returncode == 128 + number
    assert [worker.wait(300) for worker in workers] == [0, 0]
    assert b"Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_a_stage_that_is_stopped_says_so_and_is_missed(cluster, number):
    """At once even while it waits for a step in place."""
    cluster.plan(2)
    workers = [cluster.start_worker(idx) for idx in range(2)]
    orchestrator = cluster.start_orch("Hi", "--max-tokens", "4000", "--ignore-eos")
    assert orchestrator.stdout.read(8)
    workers[1].send_signal(number)
    assert workers[1].wait(300) == 0
    assert cluster.log(1).splitlines()[-1].endswith(f"event=stopped stage=1 signal={number.name}")
    _, err = orchestrator.communicate(timeout=300)
    assert orchestrator.returncode == 1
    lines = err.decode().splitlines()
    assert [line for line in lines if "error" in line] == [lines[-1]]
    assert lines[-1].startswith("pipeline-orch: error: stage 1 is lost: ")
    assert "Traceback" not in cluster.log(0) + cluster.log(1) + err.decode()
    assert workers[0].poll() is None


# Of any stage in turn, while it serves, test_failover tells.
@pytest.mark.parametrize(
    "victim", [1, *(pytest.param(each, marks=pytest.mark.slow) for each in (0, 2))]
)
def test_a_killed_stage_is_named_and_the_others_serve_on(cluster, victim):
    cluster.plan(3)
    for idx in range(3):
        cluster.start_worker(idx)
    # No time-out makes it known.
    orch = cluster.start_orch("Hi", "--max-tokens", "4000", "--ignore-eos", "--hang-timeout", "900")
    orch.stdout.read(20)
    cluster.workers[victim].kill()
    _, stderr = orch.communicate(timeout=300)
    cluster.workers[victim].wait(300)
    assert orch.returncode == 1
    assert f"stage {victim} is lost" in stderr.decode()
    assert len([line for line in stderr.decode().splitlines() if "error:" in line]) == 1
    for idx in {0, 1, 2} - {victim}:
        assert "event=session_started" in cluster.log(idx)
        wait_until(
            lambda idx=idx: (
                "session_failed" in cluster.log(idx) or "session_ended" in cluster.log(idx)
            )
        )
        assert cluster.workers[idx].poll() is None
    cluster.start_worker(victim)
    again = cluster.orch("Hi", "--max-tokens", "3")
    assert again.returncode == 0, again.stderr


def test_a_prompt_of_many_chunks_gives_the_reference_tokens(cluster):
    cluster.plan(2)
    cluster.start_worker(0)
    cluster.start_worker(1)
    prompt = "All work and no play makes a dull pipeline. " * 30
    out = cluster.directory / "latency.json"
    result = cluster.orch(prompt, "--max-tokens", "8", "--latency-out", out, "--ignore-eos")
    assert result.returncode == 0, result.stderr
    reference = expected_text(cluster.model_dir, prompt, 8)
    assert json.loads(out.read_text())["token_ids"] == reference


def test_logs_and_errors_never_hold_the_prompt(cluster):
    cluster.plan(2)
    cluster.start_worker(0, "--verbose")
    cluster.start_worker(1, "--verbose")
    result = cluster.orch("xylophone zebra", "--max-tokens", "5", "--verbose")
    assert result.returncode == 0, result.stderr
    for text in (result.stderr, cluster.log(0), cluster.log(1)):
        assert "xylophone" not in text
        assert "zebra" not in text


def test_the_plan_command_writes_what_the_workers_take(cluster):
    path = cluster.directory / "planned.json"
    result = cluster.orch_command(
        "plan", "--model-dir", cluster.model_dir, "--stages", "3", "-o", path, "--base-port", "9500"
    )
    assert result.returncode == 0, result.stderr
    stages = json.loads(path.read_text())["stages"]
    assert [stage["layer_end"] for stage in stages][-1] == 4
    assert stages[1]["endpoint"]["control"] == {"type": "tcp", "addr": "127.0.0.1:9510"}
    assert all(len(stage["weight_hashes"]) == 1 for stage in stages)


def test_a_tokenizer_of_another_model_is_told_before_anything_is_sent(cluster):
    path = cluster.model_dir / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["Hi"] = 256
    tokenizer["model"]["merges"] = [["H", "i"]]
    path.write_text(json.dumps(tokenizer))
    cluster.plan(1)
    cluster.start_worker(0)
    result = cluster.orch("Hello", "--max-tokens", "3")
    assert result.returncode == 2
    assert "the tokenizer has 257 tokens, the model 256" in result.stderr
    assert result.stdout == ""


def test_a_prompt_with_a_token_the_model_does_not_have_is_told_before_anything_is_sent(cluster):
    from tokenizers import Tokenizer

    path = cluster.model_dir / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(path))
    cluster.plan(1)
    cluster.start_worker(0)
    result = cluster.orch("Hi<pad>", "--max-tokens", "3")
    assert result.returncode == 2
    assert "token 256, and the model has only 0 to 255" in result.stderr
    assert result.stdout == ""
    assert cluster.orch("Hi", "--max-tokens", "3").returncode == 0
