import json
import subprocess
import sys

import pytest

from transport.dial_and_listen import TcpEndpoint
from transport.errors import EndpointError
from transport.relay_manifest import manifest_maps


def tcp(port):
    return {"type": "tcp", "addr": f"parent.example:{port}"}


def vsock(cid, port):
    return {"type": "vsock", "cid": cid, "port": port}


@pytest.fixture
def manifest():
    """Three stages in enclaves of one parent."""
    ends = [
        {"control": tcp(9000), "data_in": tcp(9001), "data_out": vsock(3, 6000)},
        {"control": tcp(9002), "data_in": vsock(17, 5001), "data_out": vsock(3, 6001)},
        {"control": tcp(9004), "data_in": vsock(18, 5001), "data_out": vsock(3, 6002)},
    ]
    return {"stages": [{"stage_idx": i, "endpoint": each} for i, each in enumerate(ends)]}


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "manifest.json"

    def write(value):
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def maps(path, results=None, cids=()):
    return [str(each) for each in manifest_maps(path, "0.0.0.0", results, 8, dict(cids))]


BETWEEN = [
    "tcp:0.0.0.0:9000=vsock:16:5000",
    "tcp:0.0.0.0:9001=vsock:16:5001",
    "vsock:3:6000=vsock:17:5001",
    "tcp:0.0.0.0:9002=vsock:17:5000",
    "vsock:3:6001=vsock:18:5001",
    "tcp:0.0.0.0:9004=vsock:18:5000",
]


def test_every_channel_of_a_manifest_gets_its_map(manifest, write):
    results = TcpEndpoint("user.example", 9100)
    assert maps(write(manifest), results) == [*BETWEEN, "vsock:3:6002=tcp:user.example:9100"]


def test_without_results_the_last_stage_is_left_to_who_listens_on_vsock(manifest, write):
    assert maps(write(manifest)) == BETWEEN


def test_cids_of_started_enclaves_are_carried_to_in_the_places_of_the_usual_ones(manifest, write):
    results = TcpEndpoint("user.example", 9100)
    carried = [line.replace("vsock:17:", "vsock:40:") for line in BETWEEN]
    last = "vsock:3:6002=tcp:user.example:9100"
    assert maps(write(manifest), results, {1: 40}) == [*carried, last]
    with pytest.raises(EndpointError, match=r"--cid 3: .* has 3 stages"):
        maps(write(manifest), results, {3: 40})


def test_a_template_is_carried_where_its_enclaves_run_and_what_the_parent_dials_is_not(write):
    ends = [
        {"control": vsock(0, 5000), "data_in": vsock(0, 5001), "data_out": vsock(0, 5001)},
        {"control": vsock(0, 5000), "data_in": vsock(0, 5001), "data_out": vsock(3, 5002)},
    ]
    path = write({"stages": [{"stage_idx": i, "endpoint": each} for i, each in enumerate(ends)]})
    assert maps(path) == ["vsock:3:5001=vsock:17:5001"]
    assert maps(path, TcpEndpoint("user.example", 9100), {0: 8, 1: 9}) == [
        "vsock:3:5001=vsock:9:5001", "vsock:3:5002=tcp:user.example:9100",
    ]  # fmt: skip


def test_one_stage_needs_no_map_between_stages(manifest, write):
    del manifest["stages"][1:]
    results = TcpEndpoint("user.example", 9100)
    assert maps(write(manifest), results) == [
        *BETWEEN[:2], "vsock:3:6000=tcp:user.example:9100",
    ]  # fmt: skip


def end(stage, name, value):
    def change(manifest):
        manifest["stages"][stage]["endpoint"][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("stages"), "no list of stages"),
        (lambda m: m.update(stages={}), "no list of stages"),
        (lambda m: m.update(stages=[]), "no list of stages"),
        (lambda m: m["stages"].reverse(), "stages[0] is not the stage of that index"),
        (lambda m: m.update(stages=["x"]), "stages[0] is not the stage of that index"),
        (lambda m: m["stages"][1].pop("endpoint"), "stage 1 has no TCP or vsock address"),
        (lambda m: m["stages"][1].update(endpoint=[]), "stage 1 has no TCP or vsock address"),
        (end(0, "control", {"type": "tcp", "addr": 9}), "no TCP or vsock address for control"),
        (end(0, "control", {"type": "tcp", "addr": "x"}), "'x' is not valid"),
        (end(0, "control", vsock(17, 5000)), "expected vsock:16:5000 or TCP"),
        (end(0, "control", vsock(0, 5001)), "expected vsock:16:5000 or TCP"),
        (end(0, "data_in", vsock(3, 5001)), "expected vsock:16:5001 or TCP"),
        (end(1, "data_in", tcp(9011)), "expected vsock:17:5001"),
        (end(1, "data_in", vsock(18, 5001)), "expected vsock:17:5001"),
        (end(1, "data_in", vsock("17", 5001)), "no TCP or vsock address for data_in"),
        (end(1, "data_out", vsock(-1, 5001)), "vsock CID -1 is out of range"),
        (end(1, "data_out", vsock(4, 6001)), "expected vsock:3:PORT"),
        (end(1, "data_out", {"type": "unix", "path": "/x"}), "no TCP or vsock address"),
    ],
)
def test_a_manifest_that_says_too_little_is_named(manifest, write, change, words):
    change(manifest)
    with pytest.raises(EndpointError) as caught:
        maps(write(manifest))
    assert words in str(caught.value)


def test_a_file_that_is_no_manifest_is_named(write, tmp_path):
    with pytest.raises(EndpointError, match="No such file"):
        maps(tmp_path / "none.json")
    for text, words in (("{", "not JSON"), ("[" * 100_000, "not JSON"), (" " * (5 << 20), "over")):
        with pytest.raises(EndpointError, match=words):
            maps(write(text))


def relay(*arguments):
    command = [sys.executable, "-m", "transport.relay_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_command_ends_with_one_clear_line(manifest, write):
    path = write(manifest)
    manifest["stages"][1]["endpoint"]["control"] = tcp(9000)
    for arguments, words in (
        ([], "give --map or --manifest"),
        (["--results", "a:1"], "go with --manifest"),
        (["--cid", "0=16"], "go with --manifest"),
        (["--manifest", path, "--cid", "0=x"], "--cid 0=x: write STAGE=CID"),
        (["--manifest", "/no/manifest"], "cannot read manifest /no/manifest"),
        (["--manifest", path, "--results", "nowhere"], "'nowhere' is not valid"),
        (["--manifest", path, "--map", "0.0.0.0:9000=a:1"], "0.0.0.0:9000 listens for more than"),
        (["--manifest", write(manifest)], "0.0.0.0:9000 listens for more than one map"),
    ):
        done = relay(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
