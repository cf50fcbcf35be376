"""MANIFEST.md says what the code does: its fields, its example, its hash."""

import hashlib
import re
from pathlib import Path

import pytest

import pipeline.agreement
from pipeline.agreement.manifest import CORE_DOMAIN, Manifest, StageSpec, load_manifest

HERE = Path(pipeline.agreement.__file__).parent
TEXT = (HERE / "MANIFEST.md").read_text()
EXAMPLE = load_manifest(HERE.parents[1] / "manifests" / "gpt2_1stage.json")


def block(name):
    return re.search(rf"```{name}\n(.*)\n```", TEXT).group(1)


@pytest.mark.parametrize(("kind", "head"), [(Manifest, "field"), (StageSpec, "field of a stage")])
def test_every_field_is_told_and_no_other(kind, head):
    table = re.search(rf"\| {head} \|.*\n\|.*\n((?:\|.*\n)+)", TEXT).group(1)
    named = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    told = [name for cell in named for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(kind.model_fields)


def test_the_example_has_the_core_and_the_hash_that_are_shown():
    shown = hashlib.sha256(CORE_DOMAIN + block("core").encode()).hexdigest()
    assert shown == block("hash") == EXAMPLE.core_hash().hex()
