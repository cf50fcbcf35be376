"""Files are read once, hashed whole and checked to the byte before a tensor may be used."""

import contextlib
import hashlib
import json
import shutil
import struct
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.dtypes import BFLOAT16, from_floats, to_floats
from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard, required_files
from pipeline.weights import checkpoint, checkpoint_header, file_pieces, verified_file
from pipeline.weights.read_ahead import PLACES
from pipeline.weights.tensor_sinks import CopySink, shared_sinks

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.arange(5, dtype=torch.int64),
    "c": torch.linspace(-1, 1, 6).to(torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 7),
}


@pytest.fixture
def stored(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def rewrite(directory: Path, change) -> None:
    """Apply `change` to the header's entries and write the file with the same payload."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    change(entries)
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def load_a(directory: Path, expected_hashes=None) -> torch.Tensor:
    destination = floats(3, 4)
    checkpoint.load_tensors(
        directory, {"a": CopySink(destination)}, expected_hashes=expected_hashes
    )
    return torch.from_numpy(destination)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_the_header_reads_as_the_safetensors_library_reads_it(stored):
    path = stored / "model.safetensors"
    with path.open("rb", buffering=0) as file:
        ours = {tensor.name: tensor for tensor in checkpoint_header.read_header(file, path).tensors}
    with safe_open(path, "pt") as theirs:
        assert set(ours) == set(theirs.keys())
        for name, tensor in ours.items():
            view = theirs.get_slice(name)
            assert (tensor.dtype, list(tensor.shape)) == (view.get_dtype(), view.get_shape())
    assert checkpoint.tensor_sizes(stored) == {k: v.nbytes for k, v in TENSORS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [16, 40, 1 << 20])
def test_blocks_of_any_size_give_the_librarys_values(tmp_path, monkeypatch, dtype, block_bytes):
    monkeypatch.setattr(verified_file, "BLOCK_BYTES", block_bytes)
    source = {"w": torch.randn(7, 9).to(dtype), "v": torch.randn(11).to(dtype)}
    save_file(source, tmp_path / "model.safetensors")
    destinations = {"w": floats(9, 7).T, "v": floats(11)}
    sinks = {name: CopySink(array) for name, array in destinations.items()}
    checkpoint.load_tensors(tmp_path, sinks, expected_hashes=None)
    expected = load_file(tmp_path / "model.safetensors")
    for name, array in destinations.items():
        assert torch.equal(torch.from_numpy(array), expected[name].float())


def test_hashes_are_those_of_sha256sum_and_admit_the_file(stored):
    path = stored / "model.safetensors"
    hashes = checkpoint.hash_files([path])
    assert hashes == [hashlib.sha256(path.read_bytes()).hexdigest()]
    assert torch.equal(load_a(stored, hashes), TENSORS["a"])
    assert torch.equal(load_a(stored, [hashes[0].upper()]), TENSORS["a"])


def test_any_changed_byte_of_the_payload_fails_the_hash(stored):
    path = stored / "model.safetensors"
    hashes = checkpoint.hash_files([path])
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    for index in range(8 + length, len(raw)):
        path.write_bytes(raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :])
        with pytest.raises(ModelError, match=f"expected {hashes[0]}"):
            load_a(stored, hashes)


def test_a_tensor_nobody_wants_is_hashed_in_pieces_however_long_its_rows(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({**TENSORS, "long": torch.zeros(1, 16 << 20, dtype=torch.uint8)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tracemalloc.start()
    try:
        assert torch.equal(load_a(tmp_path, [digest]), TENSORS["a"])
        assert tracemalloc.get_traced_memory()[1] < (2 * PLACES + 1) * verified_file.BLOCK_BYTES
    finally:
        tracemalloc.stop()


def test_another_number_of_hashes_is_refused(stored):
    with pytest.raises(ModelError, match=r"2 weight hashes .* reads 1 files \(model.safetensors\)"):
        load_a(stored, ["0" * 64] * 2)


def test_every_truncation_is_refused(stored):
    path = stored / "model.safetensors"
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError, match="truncated"):
            load_a(stored)
    path.write_bytes(raw + b"\0")
    with pytest.raises(ModelError, match="too long"):
        load_a(stored)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda e: e["a"].update(shape=[4, 4]), "spans"),
        (lambda e: e["a"].update(shape=[-3, -4]), "shape"),
        (lambda e: e["a"].update(shape=[3.0, 4]), "shape"),
        (lambda e: e["a"].update(shape=[True, 12]), "shape"),
        (lambda e: e["a"].update(shape=[1] * 9), "shape"),
        (lambda e: e["a"].update(dtype="F33"), "unknown dtype 'F33'"),
        (lambda e: e["a"].update(dtype=["F32"]), "unknown dtype"),
        (lambda e: e["a"].update(data_offsets=[0]), "offsets"),
        (lambda e: e["a"].update(data_offsets=[1 << 70, (1 << 70) + 48]), "offsets"),
        (lambda e: e["a"].update(extra=1), "described by"),
        (lambda e: e.update(x={"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}), "starts at"),
        (lambda e: e.pop("b"), "starts at|too long"),
        (lambda e: e.update(a=5), "described by 5"),
    ],
)
def test_an_inconsistent_header_is_refused(stored, change, told):
    rewrite(stored, change)
    with pytest.raises(ModelError, match=told) as caught:
        load_a(stored)
    assert str(stored / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"[]", "not an object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a":{},"a":{}}', "twice"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_header_that_is_no_object_is_refused(tmp_path, header, told):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match=told):
        load_a(tmp_path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40))
    with pytest.raises(ModelError, match="a header of 1099511627776 bytes"):
        load_a(tmp_path)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_header_bytes_give_tensors_or_the_one_error(raw):
    with contextlib.suppress(checkpoint_header.CorruptHeader):
        checkpoint_header.parse_header_untrusted(raw)


def test_missing_tensor_wrong_shape_and_integer_weights_are_named(stored):
    with pytest.raises(ModelError, match="tensor zz is missing"):
        checkpoint.load_tensors(stored, {"zz": CopySink(floats(1))}, expected_hashes=None)
    with pytest.raises(
        ModelError, match=r"tensor a has shape \[3, 4\], config.json means \[4, 3\]"
    ):
        checkpoint.load_tensors(stored, {"a": CopySink(floats(4, 3))}, expected_hashes=None)
    with pytest.raises(ModelError, match="tensor b is stored as I64"):
        checkpoint.load_tensors(stored, {"b": CopySink(floats(5))}, expected_hashes=None)


def test_a_directory_without_weights_says_what_to_fetch(tmp_path):
    with pytest.raises(ModelError, match=r"no model.safetensors .*: fetch a model"):
        checkpoint.weight_files(tmp_path)


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("../model.safetensors", "outside its directory"),
        ("a/../../model.safetensors", "outside its directory"),
        ("./../model.safetensors", "outside its directory"),
        ("/model.safetensors", "outside its directory"),
        ("..", "outside its directory"),
        ("", "no file"),
        (".", "no file"),
        ("a\0b", "no file"),
    ],
)
def test_an_index_may_not_lead_out_of_its_directory(tmp_path, file, word):
    index = {"weight_map": {"a": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=word):
        checkpoint.weight_files(tmp_path)


@pytest.fixture
def sharded(make_oracle, tmp_path):
    """The untied Llama as several files with an index."""
    oracle = make_oracle("llama-untied-gqa")
    oracle.model.save_pretrained(tmp_path, max_shard_size="25KB")
    assert len(checkpoint.weight_files(tmp_path)) > 3
    return oracle, tmp_path


def test_a_sharded_model_equals_the_single_file_and_each_stage_reads_its_own_files(
    sharded, make_pipeline, token_ids
):
    oracle, directory = sharded
    config = load_config(directory)
    expected = make_pipeline(oracle.split(2)).greedy(token_ids, 4)[1]
    stages, read = [], []
    for start, end in ((0, 2), (2, 4)):
        files = required_files(directory, config, range(start, end))
        assert files == sorted(files)
        read.append(files)
        hashes = checkpoint.hash_files(files)
        stages.append(load_shard(directory, config, start, end, expected_hashes=hashes))
    assert torch.equal(make_pipeline(stages).greedy(token_ids, 4)[1], expected)
    assert all(len(files) < len(checkpoint.weight_files(directory)) for files in read)


@pytest.mark.parametrize("prefix", ["./", "weights/", "./a//b/./"])
def test_an_index_may_spell_its_files_anyhow_below_its_directory(sharded, prefix):
    _, directory = sharded
    index_path = directory / checkpoint.INDEX_FILE
    index = json.loads(index_path.read_text())
    before = checkpoint.weight_files(directory)
    hashes = checkpoint.hash_files(before)
    (directory / prefix).mkdir(parents=True, exist_ok=True)
    for path in before:
        path.rename(directory / prefix / path.name)
    names = {tensor: prefix + file for tensor, file in index["weight_map"].items()}
    index_path.write_text(json.dumps({"weight_map": names}))
    after = checkpoint.weight_files(directory)
    assert after == [directory / prefix / path.name for path in before]
    assert checkpoint.hash_files(after) == hashes
    load_shard(directory, load_config(directory), 0, 4, expected_hashes=hashes)


def test_a_stage_does_not_need_the_other_stages_files(sharded):
    _, directory = sharded
    config = load_config(directory)
    needed = required_files(directory, config, range(2, 4))
    for path in checkpoint.weight_files(directory):
        if path not in needed:
            path.unlink()
    load_shard(directory, config, 2, 4, expected_hashes=None)
    with pytest.raises(ModelError, match=r"cannot read .*safetensors: No such file"):
        load_shard(directory, config, 0, 2, expected_hashes=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_compute_as_their_values_in_float32(
    make_oracle, make_pipeline, oracle_class, tmp_path, token_ids, dtype
):
    source = make_oracle("llama-tied-llama3-rope")
    shutil.copytree(source.directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    rounded = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})
    model = type(source.model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    oracle = oracle_class(tmp_path, model)
    tokens, logits = make_pipeline(oracle.split(1)).greedy(token_ids, 16)
    expected_tokens, expected = oracle.greedy(token_ids, 16)
    assert tokens == expected_tokens
    assert (logits - expected).abs().max() <= 1e-4


def test_gpt2_loads_with_and_without_its_prefix(make_oracle, make_pipeline, tmp_path, token_ids):
    source = make_oracle("gpt2")
    shutil.copytree(source.directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert any(name.startswith("transformer.") for name in tensors)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)  # as the hub's file has
    save_file(bare, path)
    shard = load_shard(tmp_path, load_config(tmp_path), 0, 4, expected_hashes=None)
    expected = make_pipeline(source.split()).greedy(token_ids, 4)[1]
    assert torch.equal(make_pipeline([shard]).greedy(token_ids, 4)[1], expected)


class SlowSink(CopySink):
    """Lets whoever reads ahead come as far as that may."""

    def write(self, first, rows):
        time.sleep(0.002)
        super().write(first, rows)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_what_is_read_ahead_overwrites_nothing_that_is_in_use(tmp_path, monkeypatch, num_threads):
    monkeypatch.setattr(verified_file, "BLOCK_BYTES", 64)
    monkeypatch.setattr(file_pieces, "MIN_PIECE_BYTES", 256)
    torch.manual_seed(0)
    wanted = {f"{i:02}.wanted": torch.randn(8, 16) for i in range(6)}
    others = {f"{i:02}.other": torch.randn(64, 16) for i in range(6)}
    path = tmp_path / "model.safetensors"
    save_file(wanted | others, path)
    found = {name: floats(8, 16) for name in wanted}
    sinks = {name: SlowSink(array) for name, array in found.items()}
    (pin,) = checkpoint.pin_files([path])
    checkpoint.load_tensors(
        tmp_path,
        sinks,
        expected_hashes=[pin.digest],
        pieces={pin.digest: pin.pieces},
        num_threads=num_threads,
    )
    for name, array in found.items():
        assert torch.equal(torch.from_numpy(array), wanted[name])


def test_a_sink_that_fails_ends_the_reading(tmp_path):
    class FailingSink(CopySink):
        def write(self, first, rows):
            raise MemoryError

    save_file(TENSORS, tmp_path / "model.safetensors")
    before = threading.active_count()
    with pytest.raises(MemoryError):
        checkpoint.load_tensors(tmp_path, {"a": FailingSink(floats(3, 4))}, expected_hashes=None)
    assert threading.active_count() <= before


def test_a_tensor_that_several_take_is_what_all_of_them_can_take(stored):
    one, two = floats(3, 4), np.zeros((3, 4), BFLOAT16)
    both = shared_sinks([{"a": CopySink(one)}, {"a": CopySink(two, ("F32", "F16"))}])
    assert both["a"].dtypes == ["F32", "F16"]
    assert not both["a"].is_optional
    checkpoint.load_tensors(stored, both, expected_hashes=None)
    assert one.any()
    assert np.array_equal(to_floats(two), to_floats(from_floats(one, BFLOAT16)))


def test_what_one_of_several_finds_wrong_is_wrong():
    class Wrong(CopySink):
        def problem(self):
            return "is wrong"

    both = shared_sinks([{"a": CopySink(floats(2))}, {"a": Wrong(floats(2))}])
    assert both["a"].problem() == "is wrong"
