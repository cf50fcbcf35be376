import json
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.agreement.manifest import (
    MAX_STAGES,
    build_manifest,
    dump_manifest,
    load_manifest,
    parse_manifest,
)
from pipeline.errors import ManifestError
from transport.dial_and_listen import TcpEndpoint, UnixEndpoint, VsockEndpoint

HASH = "ab" * 32
PCR = "cd" * 48


def tcp(port):
    return {"type": "tcp", "addr": f"127.0.0.1:{port}"}


def stage(idx, start, end):
    base = 9000 + 10 * idx
    return {
        "stage_idx": idx,
        "layer_start": start,
        "layer_end": end,
        "weight_hashes": [],
        "expected_measurements": {},
        "endpoint": {
            "control": tcp(base),
            "data_in": tcp(base + 1),
            "data_out": tcp(base + 11),
        },
    }


@pytest.fixture
def raw():
    return {
        "model_name": "gpt2",
        "model_version": "1.0",
        "total_layers": 12,
        "stages": [stage(0, 0, 6), stage(1, 6, 12)],
        "activation_spec": {"dtype": "F32", "hidden_dim": 768, "max_seq_len": 1024},
    }


def parse(value):
    return parse_manifest(json.dumps(value))


def test_a_manifest_of_the_older_shape_loads_unchanged(raw):
    # Field names, nesting and dtype spelling as the older system writes them.
    raw["stages"][0]["expected_measurements"] = {"0": PCR, "2": PCR}
    raw["stages"][1]["endpoint"]["control"] = {"type": "vsock", "cid": 17, "port": 5000}
    manifest = parse(raw)
    assert manifest.stage(0).measurements() == {0: b"\xcd" * 48, 2: b"\xcd" * 48}
    assert manifest.endpoint(0).control.to_endpoint() == TcpEndpoint("127.0.0.1", 9000)
    assert manifest.endpoint(1).control.to_endpoint() == VsockEndpoint(17, 5000)


def test_a_written_manifest_reads_back_equal(raw, tmp_path):
    manifest = parse(raw)
    path = tmp_path / "m.json"
    path.write_text(dump_manifest(manifest))
    assert load_manifest(path) == manifest


def change(raw, path, value):
    raw = deepcopy(raw)
    *parents, last = path
    target = raw
    for key in parents:
        target = target[key]
    target[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("stages", 1, "layer_start"), 7, r"gap: stages\[1\] starts at layer 7, expected 6"),
        (("stages", 1, "layer_start"), 5, r"overlap: stages\[1\] starts at layer 5, expected 6"),
        (("stages", 0, "layer_start"), 1, "gap"),
        (("stages", 1, "stage_idx"), 0, r"stages\[1\] has stage_idx 0, expected 1"),
        (("total_layers",), 14, "expected 14 layers, the stages cover 12"),
        (("stages", 1, "layer_end"), 6, "covers no layer"),
        (("stages",), [], "at least one stage"),
        (("stages", 0, "colour"), 1, "unknown field 'stages.0.colour'"),
        (("stages", 0, "endpoint", "control"), tcp(70000), "70000"),
        (("stages", 0, "endpoint", "control"), {"type": "tcp", "addr": "nowhere"}, "nowhere"),
        (("stages", 0, "endpoint", "control"), {"type": "udp", "addr": "x:1"}, "udp"),
        (("stages", 0, "weight_hashes"), ["xyz"], "xyz"),
        (("stages", 0, "expected_measurements"), {"0": "ab"}, "ab"),
        (("stages", 0, "expected_measurements"), {"32": PCR}, "32"),
        (("activation_spec", "dtype"), "F8", "F8"),
        (("model_name",), None, "model_name"),
        # Nothing is converted: two readers could convert differently.
        (("total_layers",), "12", "total_layers.*'12'"),
        (("total_layers",), 12.0, "total_layers.*'12.0'"),
        (("stages", 1, "stage_idx"), True, "stages.1.stage_idx"),
        (("stages", 0, "require_weight_hashes"), "true", "require_weight_hashes"),
        (("stages", 0, "expected_measurements"), {"00": PCR}, "without leading zeros.*'00'"),
        (("stages", 0, "expected_measurements"), {"0": PCR, "00": PCR}, "leading zeros"),
        (("stages", 0, "expected_measurements"), {" 1": PCR}, "without leading zeros"),
        (("stages", 0, "expected_measurements"), {"1" * 5000: PCR}, "without leading zeros"),
        (("eos_token_ids",), [1 << 32], "eos_token_ids"),
        (("stages",), [stage(i, i, i + 1) for i in range(MAX_STAGES + 1)], "at most 256"),
    ],
)
def test_an_inconsistent_manifest_is_refused_in_one_line_with_the_value(raw, path, value, message):
    with pytest.raises(ManifestError, match=message) as caught:
        parse(change(raw, path, value))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_json_is_refused():
    with pytest.raises(ManifestError, match="not JSON"):
        parse_manifest("{", "m.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"nothing\.json"):
        load_manifest(tmp_path / "nothing.json")


def test_a_stage_index_out_of_range_is_refused(raw):
    with pytest.raises(ManifestError, match="stage index 2 is out of range"):
        parse(raw).stage(2)


def test_the_core_ignores_addresses_and_measurements_alone(raw):
    core = parse(raw).core_hash()
    moved = parse(change(raw, ("stages", 0, "endpoint", "control"), tcp(1)))
    assert moved.core_hash() == core
    pinned = parse(change(raw, ("stages", 0, "expected_measurements"), {"0": PCR}))
    assert pinned.core_hash() == core
    for path, value in (
        (("model_name",), "other"),
        (("stages", 0, "weight_hashes"), [HASH]),
        (("orchestrator_keys",), [HASH]),
        (("activation_spec", "max_seq_len"), 512),
    ):
        assert parse(change(raw, path, value)).core_hash() != core


def test_a_core_alone_is_a_manifest_with_the_same_core(raw):
    manifest = parse(raw)
    core = parse_manifest(json.dumps(manifest.core()))
    assert core.core_hash() == manifest.core_hash()
    with pytest.raises(ManifestError, match="no endpoint"):
        core.endpoint(0)


def test_unix_addresses_with_a_port_are_hybrid_vsock(raw):
    address = {"type": "unix", "path": "/run/v.sock", "port": 5000}
    manifest = parse(change(raw, ("stages", 0, "endpoint", "control"), address))
    assert manifest.endpoint(0).control.to_endpoint() == UnixEndpoint(Path("/run/v.sock"), 5000)


def test_a_field_given_twice_is_refused_wherever_it_is(raw):
    text = json.dumps(raw)
    for twice in (
        text[:-1] + ', "model_name": "other"}',
        text.replace('"layer_start": 6', '"layer_start": 6, "layer_start": 6'),
        text.replace(
            '"expected_measurements": {}',
            f'"expected_measurements": {{"0": "{PCR}", "0": "{PCR}"}}',
            1,
        ),
    ):
        with pytest.raises(ManifestError, match="is given twice"):
            parse_manifest(twice)


def test_hex_in_capitals_means_the_same(raw):
    def pinned(case):
        changed = change(raw, ("stages", 0, "weight_hashes"), [case(HASH)])
        changed["stages"][0]["expected_measurements"] = {"0": case(PCR)}
        changed["orchestrator_keys"] = [case(HASH)]
        changed["config_hash"] = case(HASH)
        return parse(changed)

    assert pinned(str.upper) == pinned(str.lower)
    assert pinned(str.upper).core_hash() == pinned(str.lower).core_hash()


def test_as_many_stages_are_accepted_as_messages_can_name(raw):
    count = MAX_STAGES
    several = {**raw, "total_layers": count, "stages": [stage(i, i, i + 1) for i in range(count)]}
    assert len(parse(several).stages) == count


def test_a_manifest_built_from_values_is_judged_like_one_that_is_read(raw):
    assert build_manifest(raw, "test") == parse(raw)
    with pytest.raises(ManifestError, match=r"^test: total_layers"):
        build_manifest({**raw, "total_layers": 0}, "test")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_any_json_is_a_manifest_or_a_manifest_error(value):
    with pytest.raises(ManifestError):
        parse(value)


@given(st.binary())
def test_any_bytes_are_a_manifest_or_a_manifest_error(data):
    with pytest.raises(ManifestError):
        parse_manifest(data)


SEED = {
    "model_name": "gpt2",
    "model_version": "1.0",
    "total_layers": 12,
    "stages": [stage(0, 0, 6), stage(1, 6, 12)],
    "activation_spec": {"dtype": "F32", "hidden_dim": 768, "max_seq_len": 1024},
    "config_hash": HASH,
    "eos_token_ids": [0],
    "orchestrator_keys": [HASH],
}
SEED["stages"][0]["expected_measurements"] = {"0": PCR}
SEED["stages"][1]["endpoint"]["control"] = {"type": "vsock", "cid": 17, "port": 5000}


def mutate(data, value):
    """Walk to some place in `value`, and replace, delete or add something there."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 5)):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = data.draw(st.sampled_from(keys))
        match data.draw(st.sampled_from(["descend", "descend", "delete", "add"])):
            case "descend":
                value[key] = mutate(data, value[key])
            case "delete":
                del value[key]
            case _ if isinstance(value, dict):
                value[data.draw(st.text(max_size=4))] = value[key]
            case _:
                value.insert(key, value[key])
        return value
    return data.draw(JSON)


def is_a_manifest_or_refused(text):
    try:
        manifest = parse_manifest(text)
    except ManifestError:
        return
    assert parse_manifest(dump_manifest(manifest)) == manifest
    assert parse_manifest(json.dumps(manifest.core())).core_hash() == manifest.core_hash()


@given(st.data())
def test_a_manifest_with_any_fields_changed_is_one_or_is_refused(data):
    value = mutate(data, deepcopy(SEED))
    is_a_manifest_or_refused(json.dumps(value))


@given(st.data())
def test_a_manifest_with_any_bytes_changed_is_one_or_is_refused(data):
    text = json.dumps(SEED).encode()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 8)))
    is_a_manifest_or_refused(text[:start] + data.draw(st.binary(max_size=8)) + text[end:])


def client(raw, **changes):
    return raw | {"split": "client", "client": {"weight_hashes": [HASH]} | changes}


def test_a_split_that_leaves_the_ends_to_stages_is_the_one_of_before(raw):
    assert parse(raw | {"split": "stages"}).core_hash() == parse(raw).core_hash()
    assert not {"split", "client"} & parse(raw).core().keys()
    assert "split" not in dump_manifest(parse(raw))


def test_a_clients_part_is_of_the_core(raw, tmp_path):
    manifest = parse(client(raw))
    cores = {
        each.core_hash()
        for each in (
            manifest,
            parse(raw),
            parse(client(raw, weight_hashes=["cd" * 32])),
            parse(client(raw, precision="int8")),
        )
    }
    assert len(cores) == 4
    path = tmp_path / "m.json"
    path.write_text(dump_manifest(manifest))
    assert load_manifest(path) == manifest
    assert parse_manifest(json.dumps(manifest.core())).core_hash() == manifest.core_hash()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"split": "client"}, "plan --split client"),
        ({"client": {"weight_hashes": [HASH]}}, "whose split is client"),
        ({"split": "client", "client": {"weight_hashes": []}}, "client.weight_hashes"),
        ({"split": "server"}, "split"),
        ({"split": "client", "client": {"weight_hashes": [HASH], "key": 1}}, "client.key"),
    ],
    ids=str,
)
def test_a_clients_part_is_pinned_or_not_there(raw, fields, words):
    with pytest.raises(ManifestError, match=words):
        parse(raw | fields)
