"""The handler of a serverless worker, as the service's own SDK runs it."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode

import httpx
import pytest

from pipeline.doors.messages import DoorError, DoorFault
from pipeline.doors.runpod import answer_job, parse_options, start_door

EVENT = {
    "cloaked_embedding": b64encode(b"sealed").decode(), "encrypted_session_key": "", "nonce": "",
    "shape": [1], "dtype": "F32", "session_id": "s",
}  # fmt: skip
# An echoing door, run by the SDK as it runs the module.
WORKER = """
import contextlib, sys
import runpod
from pipeline.doors.messages import InferResponse
from pipeline.doors.runpod import start_door

class Echo:
    async def infer(self, request):
        return InferResponse(request.cloaked_embedding, request.shape, request.dtype, 1)

@contextlib.asynccontextmanager
async def opened():
    yield Echo()

runpod.serverless.start({"handler": start_door(opened)})
"""


async def test_a_job_is_answered_as_an_event_over_http_is(echo_door):
    output = await answer_job(echo_door, {"id": "1", "input": EVENT})
    assert output["output"] == EVENT["cloaked_embedding"]
    assert output["tokens_processed"] == 7


@pytest.mark.parametrize("job", [{}, {"input": None}, {"input": {"shape": "x"}}])
async def test_a_bad_job_fails_with_a_fault_that_its_client_can_read(echo_door, job):
    assert json.loads((await answer_job(echo_door, job))["error"])["fault"] == "invalid"


async def test_a_wrong_key_comes_with_the_right_one(echo_door, shown_key):
    echo_door.fault = DoorError(DoorFault.WRONG_KEY, "sealed to another", shown_key)
    error = json.loads((await answer_job(echo_door, {"input": EVENT}))["error"])
    assert error["fault"] == "wrong_key"
    assert b64encode(shown_key.public_key).decode() == error["key"]["public_key"]


def test_a_door_that_does_not_open_says_so_at_once():
    @contextlib.asynccontextmanager
    async def broken():
        raise DoorError(DoorFault.UNAVAILABLE, "no store")
        yield

    with pytest.raises(DoorError, match="no store"):
        start_door(broken)


def test_flags_of_the_sdk_pass_and_variables_count_where_no_flag_is():
    options = parse_options(
        ["--rp_serve_api", "--test_input", "{}", "--threads", "2"], {"VEILPIPE_MODEL_DIR": "/m"}
    )
    assert (str(options.model_dir), options.threads, options.is_dev) == ("/m", 2, False)
    with pytest.raises(SystemExit):
        parse_options([], {})
    with pytest.raises(SystemExit):
        parse_options(["--model-dir", "/m", "--ignore-measurements"], {})
    assert parse_options(
        ["--model-dir", "/m", "--dev", "--ignore-measurements"], {}
    ).ignores_measurements


@pytest.fixture
def worker(tmp_path):
    pytest.importorskip("runpod", reason="the extra `runpod` is not installed")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [sys.executable, str(script)]


@pytest.mark.slow
def test_the_sdks_test_input_is_answered(worker):
    job = json.dumps({"input": EVENT})
    done = subprocess.run(
        [*worker, "--test_input", job], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert EVENT["cloaked_embedding"] in done.stdout + done.stderr
    bad = subprocess.run(
        [*worker, "--test_input", '{"input": {}}'],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert bad.returncode == 1
    assert "invalid" in bad.stdout + bad.stderr
    assert "Traceback" not in bad.stdout + bad.stderr


@pytest.mark.slow
def test_the_sdks_own_server_answers_jobs(worker):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)]
    with subprocess.Popen([*worker, *flags], stdout=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until_served(url)
            answer = httpx.post(f"{url}/runsync", json={"input": EVENT}).json()
            assert answer["status"] == "COMPLETED"
            assert answer["output"]["output"] == EVENT["cloaked_embedding"]
            refused = httpx.post(f"{url}/runsync", json={"input": {}}).json()
            assert refused["status"] == "FAILED"
            assert json.loads(refused["error"])["fault"] == "invalid"
            job = httpx.post(f"{url}/run", json={"input": EVENT}).json()
            done = httpx.post(f"{url}/status/{job['id']}").json()
            assert done["output"]["output"] == EVENT["cloaked_embedding"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(300)


def until_served(url):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(url)
            return
        time.sleep(0.2)
    pytest.fail("the SDK's server did not come up")
