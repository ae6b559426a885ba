"""Weights: streamed into one file or several, read by safetensors, and compared with what was computed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from adamerge.errors import ExportError
from adamerge.io.safetensors_writer import nbytes_of, verify_tensors, write_tensors, write_weights

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


@pytest.mark.parametrize(
    ("most", "files"),
    [
        (1000, [["b", "a", "c"]]),
        (20, [["b", "a", "c"]]),
        (19, [["b"], ["a", "c"]]),
        (4, [["b"], ["a"], ["c"]]),  # a tensor that is larger stands alone
    ],
)
def test_several_files_and_an_index(tmp_path, most, files):
    """12 bytes, 8 and none."""
    header = {name: (value.dtype, value.shape) for name, value in VALUES.items()}
    tensors = ((name, value.flatten().split(4)) for name, value in VALUES.items())
    found = write_weights(tmp_path, "w.safetensors", header, tensors, most)
    names = [f"w-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["w.safetensors"]
    assert {file: [*hashes] for file, hashes in found.items()} == dict(zip(names, files, strict=True))
    loaded = {}
    for file, hashes in found.items():
        verify_tensors(tmp_path / file, hashes)
        loaded |= load_file(tmp_path / file)
    assert loaded.keys() == VALUES.keys() and all(torch.equal(loaded[name], VALUES[name]) for name in VALUES)
    index = tmp_path / "w.safetensors.index.json"
    assert index.exists() == (len(files) > 1) and nbytes_of(header) == 20
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"] == {"total_size": 20}
        assert content["weight_map"] == {name: file for file, own in zip(names, files, strict=True) for name in own}


def test_what_does_not_read_back_is_refused(tmp_path):
    hashes = written(tmp_path / "w.safetensors")
    with pytest.raises(ExportError, match="'b' does not read back"):
        verify_tensors(tmp_path / "w.safetensors", hashes | {"b": hashes["a"]})
    with pytest.raises(ExportError, match="does not read back"):
        verify_tensors(tmp_path / "w.safetensors", {"b": hashes["b"]})
    with pytest.raises(ExportError, match="cannot write"):
        written(tmp_path / "nowhere" / "w.safetensors")
