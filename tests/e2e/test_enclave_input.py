"""What is wrong on a machine that should run an enclave's stage ends in one clear line."""

import pytest


@pytest.fixture
def enclaves(cluster):
    """The manifest of one stage in an enclave, its orchestrator named."""
    key = cluster.orch_command("keygen", cluster.directory / "key.pem").stdout.strip()
    done = cluster.orch_command(
        "plan", "--model-dir", cluster.model_dir, "--stages", "1", "--vsock",
        "--orchestrator-key", key, "-o", cluster.manifest,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cluster


def one_error(done, code, *words):
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert (done.returncode, len(lines)) == (code, 1), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def test_a_stage_without_a_security_module_does_not_start(enclaves):
    stage = ["--manifest", enclaves.manifest, "--stage-idx", "0"]
    done = enclaves.worker(*stage, "--model-dir", enclaves.model_dir)
    one_error(done, 2, "/dev/nsm", "run inside a Nitro Enclave")


def test_a_stage_that_is_not_pinned_is_never_dialled(enclaves):
    arguments = [each for each in enclaves.arguments() if each != "--dev"]
    done = enclaves.orch_command(*arguments, "--identity", enclaves.directory / "key.pem")
    one_error(done, 2, "stage 0", "expected_measurements")


@pytest.mark.parametrize("value", ["ab" * 47, "zz" * 48, ""])
def test_measurements_that_are_no_measurements_are_named(enclaves, value):
    enclaves.edit(lambda m: m["stages"][0].update(expected_measurements={"0": value}))
    done = enclaves.orch_command(*enclaves.arguments())
    one_error(done, 2, "stages.0.expected_measurements.0")
