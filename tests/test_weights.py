"""A weights file: streamed, read by safetensors, and compared with what was computed."""

import pytest
import torch
from safetensors.torch import load_file

from adamerge.errors import ExportError
from adamerge.weights import verify_tensors, write_tensors

VALUES = {"b": torch.arange(6.0).view(2, 3).to(torch.bfloat16), "a": torch.tensor(7), "c": torch.ones(0, 4)}


def written(path):
    header = {name: (value.dtype, value.shape) for name, value in VALUES.items()}
    return write_tensors(path, header, ((name, value.flatten().split(4)) for name, value in VALUES.items()))


def test_it_is_read_as_it_was_written(tmp_path):
    hashes = written(tmp_path / "w.safetensors")
    verify_tensors(tmp_path / "w.safetensors", hashes)
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == VALUES.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in VALUES.items())


def test_what_does_not_read_back_is_refused(tmp_path):
    hashes = written(tmp_path / "w.safetensors")
    with pytest.raises(ExportError, match="'b' does not read back"):
        verify_tensors(tmp_path / "w.safetensors", hashes | {"b": hashes["a"]})
    with pytest.raises(ExportError, match="does not read back"):
        verify_tensors(tmp_path / "w.safetensors", {"b": hashes["b"]})
    with pytest.raises(ExportError, match="cannot write"):
        written(tmp_path / "nowhere" / "w.safetensors")
