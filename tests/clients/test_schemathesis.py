"""Whatever is made of the API's own document gets an answer that the document tells of."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import new_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("schemathesis") is None,
        reason="schemathesis is not installed (veilpipe[clients])",
    ),
]

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,ignored_auth"
)
# Of each operation and phase.
EXAMPLES = 40


def test_what_is_made_of_the_document_gets_an_answer_it_tells_of(tmp_path, tiny_model):
    keys = tmp_path / "keys.txt"
    keys.write_text("sk-test-0123456789\n")
    keys.chmod(0o600)
    (tmp_path / "cluster").mkdir()
    report = tmp_path / "report.ndjson"
    with new_cluster(tmp_path / "cluster", tiny_model) as cluster:
        cluster.plan(2)
        extra = ("--api-key-file", keys, "--served-model-name", "model", "--context", "256")
        server = cluster.serve("--supervise", *extra)
        done = subprocess.run(
            [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json",
             "--header", "Authorization: Bearer sk-test-0123456789", "--checks", CHECKS,
             "--max-examples", str(EXAMPLES), "--seed", "7", "--request-timeout", "120",
             "--phases", "examples,coverage,fuzzing", "--generation-deterministic",
             "--report", "ndjson", "--report-ndjson-path", report,
             "--suppress-health-check", "all", "--no-color"],
            cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False,
        )  # fmt: skip
        assert server.process.poll() is None
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert len([json.loads(line) for line in report.read_text().splitlines()]) > 100
