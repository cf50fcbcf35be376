"""Real processes with noise on the rows between them, up to a bound that the user sets."""

import pytest

from pipeline.cli import pipeline_orch
from tests.e2e.texts_under_way import expect_the_same_whoever_dies, undisturbed

# No noise that a text would notice, so that texts can be compared.
QUIET = {"split": "client", "noise": (1e-9, 10.0)}


@pytest.fixture
def orch(command, cluster):
    cluster.plan(1, split="client", noise=(0.01, 3.0))

    def run(*extra):
        return command(pipeline_orch, *cluster.arguments("Hi", *extra))

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ["--dp-epsilon", "without a terminal give the bound"]),
        (("--dp-delta", "1e-6"), ["without a terminal give the bound"]),
        (("--dp-epsilon", "0"), ["--dp-epsilon 0: give a number above 0"]),
        (("--dp-epsilon", "-2"), ["--dp-epsilon -2"]),
        (("--dp-epsilon", "nan"), ["--dp-epsilon nan"]),
        (("--dp-epsilon", "2", "--dp-delta", "0"), ["--dp-delta 0"]),
        (("--dp-epsilon", "2", "--dp-delta", "nan"), ["--dp-delta nan"]),
        (("--dp-epsilon", "2"), ["rows compose to epsilon", "at delta 1e-05", "it would take"]),
    ],
    ids=str,
)
def test_bounds_that_will_not_do_are_refused_before_anything_starts(orch, flags, words):
    code, line = orch(*flags)
    assert code == 2
    assert all(word in line for word in words), line


def test_a_bound_without_noise_is_refused(orch, cluster):
    cluster.plan(1, split="client")
    code, line = orch("--dp-epsilon", "2")
    assert code == 2
    assert "this manifest adds no noise" in line


def test_a_text_is_told_what_it_amounts_to_and_ends_where_the_bound_does(cluster):
    cluster.plan(2, split="client")
    flags = ("--max-tokens", "30", "--ignore-eos")
    expected = cluster.orch_over(2, *flags, text="Hello")
    assert expected.returncode == 0, expected.stderr
    cluster.plan(2, **QUIET)
    whole = cluster.orch_over(2, *flags, "--dp-epsilon", "1e30", text="Hello")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout == expected.stdout
    told = next(line for line in whole.stderr.splitlines() if "rows compose to epsilon" in line)
    words = told.split()
    num_prompt, epsilon = (
        int(words[words.index("rows") - 1]),
        float(words[words.index("epsilon") + 1]),
    )
    bound = f"{epsilon * (num_prompt + 9) / num_prompt:.9g}"
    part = cluster.orch_over(2, *flags, "--dp-epsilon", bound, text="Hello")
    assert part.returncode == 1
    errors = [line for line in part.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "the session's privacy budget is spent" in errors[0]
    assert expected.stdout.startswith(part.stdout.rstrip("\n"))
    assert len("Hello") < len(part.stdout) < len(expected.stdout)


@pytest.mark.slow  # tests/pipeline/orchestrator/test_noisy_rows.py has losses at any step
def test_a_stage_killed_in_the_middle_costs_neither_text_nor_budget(cluster):
    cluster.plan(3, **QUIET)
    for idx in range(3):
        cluster.start_worker(idx)
    server = cluster.serve("--context", "512", "--dp-epsilon", "1e30")
    expect_the_same_whoever_dies(server, undisturbed(server), by_hand=cluster)


def test_texts_with_noise_carry_no_message(cluster, command, tmp_path):
    cluster.plan(1, split="client", noise=(0.01, 3.0))
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(32))
    secret.chmod(0o600)
    code, line = command(
        pipeline_orch, "stego", "encode", "--manifest", cluster.manifest, "--model-dir",
        cluster.model_dir, "--prompt", "p", "--message", "m", "--secret-file", secret, "--dev",
        "--dp-epsilon", "1e20",
    )  # fmt: skip
    assert code == 2
    assert "this manifest adds noise" in line
