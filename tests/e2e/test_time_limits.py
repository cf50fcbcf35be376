"""What takes too long ends by itself: a text, and waiting for a stage that is not up."""


def test_a_text_that_takes_too_long_ends_in_a_line_and_its_stages_serve_on(cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    long = ("--max-tokens", "4000", "--ignore-eos")
    result = cluster.orch("Hello there", *long, "--request-timeout", "0.2")
    assert result.returncode == 1
    assert result.stdout.startswith("Hello there")
    assert result.stdout.endswith("\n")
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert errors == [
        "pipeline-orch: error: the request took longer than the 0.2 s that it may take"
    ]
    after = cluster.orch("Hello there", "--max-tokens", "3", "--request-timeout", "3600")
    assert after.returncode == 0, after.stderr


def test_attempts_that_are_counted_end_before_patience_does(cluster):
    cluster.plan(1)
    result = cluster.orch("Hi", "--connect-attempts", "2", "--connect-timeout", "3600")
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "stage 0's control channel" in errors[0]
    assert errors[0].endswith("attempts made: 2")
