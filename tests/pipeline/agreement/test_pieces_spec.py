"""What a manifest says of pieces fits the file it says it of, and is of what all agree on."""

import pytest

from pipeline.agreement.manifest import build_manifest, dump_manifest, load_manifest, parse_manifest
from pipeline.errors import ManifestError
from tests.sources import ROOT

EXAMPLE = load_manifest(ROOT / "manifests" / "gpt2_1stage.json")
FILE, HASHES = "ab" * 32, "cd" * 32 + "ef" * 32 + "01" * 32


def fields(**pieces):
    spec = {"file_bytes": 21, "piece_bytes": 8, "hashes": HASHES} | pieces
    return EXAMPLE.model_dump(mode="json") | {"weight_pieces": {FILE: spec}}


def parse(**pieces):
    return build_manifest(fields(**pieces), "m.json")


def test_pieces_are_of_the_core_and_come_back(tmp_path):
    manifest = parse()
    assert manifest.core_hash() != EXAMPLE.core_hash()
    assert manifest.core_hash() != parse(hashes=HASHES.replace("c", "d")).core_hash()
    assert manifest.core_hash() != parse(file_bytes=22).core_hash()
    assert parse(hashes=HASHES.upper()).core_hash() == manifest.core_hash()
    assert parse_manifest(dump_manifest(manifest)) == manifest
    none = EXAMPLE.model_dump(mode="json") | {"weight_pieces": {}}
    assert build_manifest(none, "m.json").core_hash() == EXAMPLE.core_hash()
    assert "weight_pieces" not in dump_manifest(EXAMPLE)


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ({"file_bytes": 25}, "3 hashes are given of 25 bytes in pieces of 8, expected 4"),
        ({"file_bytes": 16}, "expected 2"),
        ({"piece_bytes": 1 << 20}, "expected 1"),
        ({"hashes": HASHES[:-1]}, "hashes"),
        ({"hashes": ""}, "hashes"),
        ({"hashes": "x" * 192}, "hashes"),
        ({"piece_bytes": 0}, "piece_bytes"),
        ({"file_bytes": 0}, "file_bytes"),
        ({"more": 1}, "more"),
    ],
)
def test_a_list_that_fits_no_file_of_that_length_is_refused(pieces, told):
    with pytest.raises(ManifestError, match=told) as caught:
        parse(**pieces)
    assert "\n" not in str(caught.value)
    assert FILE in str(caught.value)


@pytest.mark.parametrize("name", [FILE.upper(), FILE[:-1], "model.safetensors"])
def test_a_file_is_named_by_its_hash_in_one_way(name):
    raw = fields()
    raw["weight_pieces"][name] = raw["weight_pieces"].pop(FILE)
    with pytest.raises(ManifestError, match="weight_pieces"):
        build_manifest(raw, "m.json")
