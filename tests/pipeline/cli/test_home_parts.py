"""What a stage's layers need by its manifest, and the flags of `plan` that write that."""

import pytest

from pipeline.agreement.manifest import dump_manifest, parse_manifest
from pipeline.agreement.trust_policy import DevTrust
from pipeline.cli.home_parts import stage_parts
from pipeline.cli.pipeline_access import mode_of
from pipeline.cli.preparation import _encoding, _home_layers, _part
from pipeline.errors import InputError
from pipeline.models.layer_parts import OWN
from pipeline.planning.plan import PlanOptions, plan
from pipeline.scx.attention_parts import AttentionParts
from pipeline.scx.encoded_memory import EncodedMemory, EncodedRowByRow
from transport.dial_and_listen import TcpEndpoint

WHERE = TcpEndpoint("127.0.0.1", 9500)


@pytest.fixture
def parts_of(tiny_model, tmp_path):
    trust = DevTrust.create(tmp_path)

    def make(stage_idx, *, has_store=False, **options):
        manifest = plan(tiny_model, PlanOptions(**options))
        found = stage_parts(manifest, stage_idx, tiny_model, trust, has_store=has_store)
        return mode_of(manifest), found

    return make


def test_each_stage_gets_what_its_manifest_says(parts_of):
    mode, found = parts_of(0, num_stages=1, part=("attention", WHERE, None))
    assert mode == "scx"
    assert isinstance(found.parts, AttentionParts)
    assert found.session is not None
    for idx, expected in enumerate((False, True, False)):
        mode, found = parts_of(idx, num_stages=3, home_layers=(1, 1))
        assert mode == "scx-paper"
        assert isinstance(found.parts, EncodedMemory) == expected
        assert (found.session is not None) == expected
    mode, found = parts_of(0, num_stages=2)
    assert (mode, found.parts, found.session) == ("plain", OWN, None)


def test_what_is_encoded_for_a_session_is_not_stored(parts_of):
    with pytest.raises(InputError, match="--kv-store: keys and values that are encoded"):
        parts_of(0, num_stages=1, part=("attention", WHERE, None), has_store=True)
    with pytest.raises(InputError, match="--kv-store"):
        parts_of(1, num_stages=3, home_layers=(1, 1), has_store=True)
    parts_of(0, num_stages=3, home_layers=(1, 1), has_store=True)


def test_what_rows_get_beside_keys_is_the_manifests_word(parts_of, tiny_model):
    given = _encoding(0.5, 3, is_one_time=True, is_encoded="127.0.0.1:9500")
    attention = {"num_stages": 1, "part": ("attention", WHERE, None)}
    _, found = parts_of(0, **attention, encoding=given)
    keys = found.parts._new_keys()
    assert (keys.alp, keys.redundant_num, keys.one_time) == (0.5, 3, True)
    plain, encoded = (
        plan(tiny_model, PlanOptions(**attention, encoding=each)) for each in ({}, given)
    )
    assert plain.encoding is None
    assert "encoding" not in plain.core()
    assert plain.core_hash() != encoded.core_hash()
    assert parse_manifest(dump_manifest(encoded)) == encoded


def test_encoding_is_for_rows_that_lie_encoded(tiny_model):
    assert _encoding(None, None, is_one_time=False, is_encoded=None) == {}
    for given in ((0.5, None, False), (None, 3, False), (None, None, True)):
        with pytest.raises(InputError, match="say where by --attention or --home-layers"):
            _encoding(*given[:2], is_one_time=given[2], is_encoded=None)
    with pytest.raises(InputError, match="encoding is for manifests whose keys and values"):
        plan(tiny_model, PlanOptions(3, encoding={"noise": 1.0}))
    with pytest.raises(InputError, match=r"encoding\.num_decoys: decoys are read from"):
        plan(tiny_model, PlanOptions(3, home_layers=(1, 1), encoding={"num_decoys": 1}))


def test_stages_between_two_at_home_encode_as_the_manifest_says(parts_of):
    given = {"noise": 0.5, "is_one_time": True}
    for idx, expected in enumerate((False, True, False)):
        _, found = parts_of(idx, num_stages=3, home_layers=(1, 1), encoding=given)
        assert isinstance(found.parts, EncodedRowByRow) == expected
        assert (found.session is not None) == expected
        if expected:
            keys = found.parts._new_keys()
            assert (keys.alp, keys.redundant_num, keys.one_time) == (0.5, 0, True)


@pytest.mark.parametrize(
    "given", [{"noise": -1.0}, {"noise": 1e9}, {"num_decoys": -1}, {"num_decoys": 5000}], ids=str
)
def test_encoding_that_cannot_be_is_one_clear_error(tiny_model, given):
    (name,) = given
    with pytest.raises(InputError, match=f"encoding.{name}"):
        plan(tiny_model, PlanOptions(1, part=("attention", WHERE, None), encoding=given))


@pytest.mark.parametrize("text", ["1", "1,", "a,b", "1,2,3", "-1,1", "12345,1"])
def test_home_layers_are_two_numbers(text):
    with pytest.raises(InputError, match="give two numbers, as in 1,1"):
        _home_layers(text)


@pytest.mark.parametrize("layers", [(0, 1), (1, 0), (2, 2), (4, 4)])
def test_something_has_to_be_left_between_home_layers(tiny_model, layers):
    with pytest.raises(InputError, match="at least one is between them"):
        plan(tiny_model, PlanOptions(3, home_layers=layers))


def test_a_worker_has_an_address_and_a_key_has_a_worker():
    assert _part({"attention": "127.0.0.1:9500"}, None) == ("attention", WHERE, None)
    assert _part({"attention": None}, None) is None
    with pytest.raises(InputError, match="--attention: "):
        _part({"attention": "nowhere at all"}, None)
    with pytest.raises(InputError, match="--part-key is the key of a worker"):
        _part({"attention": None}, "00" * 32)
