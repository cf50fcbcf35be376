"""Whatever is made of the API's own document gets an answer that the document tells of."""

import json
import subprocess

import pytest

from tests.e2e.client_commands import client_command

pytestmark = pytest.mark.slow

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,ignored_auth"
)
# Of each operation and phase.
EXAMPLES = 40


def test_what_is_made_of_the_document_gets_an_answer_it_tells_of(tmp_path, cluster):
    keys = tmp_path / "keys.txt"
    keys.write_text("sk-test-0123456789\n")
    keys.chmod(0o600)
    report = tmp_path / "report.ndjson"
    cluster.plan(2)
    extra = ("--api-key-file", keys, "--served-model-name", "model", "--context", "256")
    server = cluster.serve("--supervise", *extra)
    done = subprocess.run(
        [client_command("schemathesis"), "run", f"{server.url}/openapi.json",
         "--header", "Authorization: Bearer sk-test-0123456789", "--checks", CHECKS,
         "--max-examples", str(EXAMPLES), "--request-timeout", "120",
         "--phases", "examples,coverage,fuzzing", "--generation-deterministic",
         "--report", "ndjson", "--report-ndjson-path", report,
         "--suppress-health-check", "all", "--no-color"],
        cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert server.process.poll() is None
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert len([json.loads(line) for line in report.read_text().splitlines()]) > 100
