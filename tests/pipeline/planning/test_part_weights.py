"""Files of weights as they are written."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.kernels.huge_pages import Arena
from pipeline.planning import part_weights
from pipeline.planning.part_weights import save_tensors
from pipeline.weights.checkpoint_header import StoredTensor
from pipeline.weights.quantization import quantise


def test_the_hash_is_that_of_the_written_file_whatever_its_tensors_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(part_weights, "BLOCK_BYTES", 64)
    tensors = {
        "matrix": np.arange(7 * 33, dtype=np.float32).reshape(7, 33),
        "across": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "number": np.array(5, np.int8),
        "none": np.empty((0, 4), np.float32),
    }
    path = tmp_path / "model.safetensors"
    digest = save_tensors(tensors, path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor)


def test_a_disk_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(OSError, match="Is a directory"):
        save_tensors({"a": np.zeros(3, np.float32)}, tmp_path)


@pytest.mark.parametrize("is_in_out", [False, True])
def test_int8_of_a_matrix_is_that_of_its_outputs_however_it_is_stored(is_in_out):
    weight = np.random.default_rng(0).standard_normal((200, 40), np.float32)
    stored = StoredTensor("w", "F32", weight.shape, 0, weight.nbytes)
    kept = part_weights._KeptInt8(stored, Arena(), is_in_out=is_in_out)
    for first in range(0, 200, 64):
        kept.sink.write(first, weight[first : first + 64])
    values, scales = quantise(weight.T if is_in_out else weight)
    found = kept.tensors()
    np.testing.assert_array_equal(found["w"], values.T if is_in_out else values)
    np.testing.assert_array_equal(found["w_scale"], scales)
