"""Files of tensorizer's are converted from and to safetensors by its own library."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli.model_directory import model_directory, tokenizer_file
from pipeline.errors import InputError, ModelError
from pipeline.planning import tensorized

NEEDS_LIBRARY = "tensorizer is not installed: pip install veilpipe[tensors]"


@pytest.fixture
def library():
    """Nothing of it is of use but here."""
    return pytest.importorskip("tensorizer", reason=NEEDS_LIBRARY)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def file(library, tmp_path, tiny_model):
    """The tiny model's weights as such a file, with what lies beside it; one tensor in bfloat16."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, directory / "model.safetensors")
    tensorized.to_tensors(directory, directory / "weights.tensors")
    return directory / "weights.tensors"


def test_a_file_becomes_the_directory_that_it_was_made_of(file):
    before = load_file(file.parent / "model.safetensors")
    (file.parent / "model.safetensors").unlink()
    directory = model_directory(file)
    after = load_file(directory / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert after["model.norm.weight"].dtype is torch.bfloat16
    for name in ("config.json", "tokenizer.json"):
        assert (directory / name).read_bytes() == (file.parent / name).read_bytes()
    assert tokenizer_file(file) == directory / "tokenizer.json"


def test_a_file_is_converted_once_and_another_anew(file, monkeypatch):
    directory = model_directory(file)
    shutil.copyfile(file, file.with_name("same.tensors"))
    monkeypatch.setattr(tensorized, "_read", lambda _: pytest.fail("it has been read"))
    assert model_directory(file.with_name("same.tensors")) == directory


BROKEN = {
    "half of it": lambda raw: raw[: len(raw) // 2],
    "text": lambda _: b"text\n" * 40,
    "nothing": lambda _: b"",
    "another weight": lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_broken_is_refused_in_one_line_and_leaves_nothing(file, name, tmp_path):
    file.write_bytes(BROKEN[name](file.read_bytes()))
    with pytest.raises(ModelError, match="cannot be read as tensorizer's") as caught:
        model_directory(file)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_a_file_without_a_configuration_is_told_so(tmp_path):
    path = tmp_path / "weights.tensors"
    path.touch()
    with pytest.raises(ModelError, match=r"lay its config\.json beside it"):
        model_directory(path)


def test_without_the_library_what_to_install_is_said(tmp_path, monkeypatch):
    path = tmp_path / "weights.tensors"
    path.touch()
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tensorizer", None)
    with pytest.raises(InputError, match=r"pip install veilpipe\[tensors\]"):
        model_directory(path)
