"""Checkpoints: the fingerprint of every bit, scans that are kept and checked, values that are no numbers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensor_files import many_dtypes, refusal

from adamerge.checkpoints.checkpoint import MERGEABLE, StateDict
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError
from adamerge.io.safetensors_file import BITS, TensorFile


@pytest.fixture(autouse=True)
def scans(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache of every test to itself, and return its folder of scans."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "adamerge" / "scans"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Return a small model of many dtypes."""
    return many_dtypes()


def aged(path: Path) -> Path:
    """Make a file look written a minute ago, as files usually are."""
    before = path.stat().st_mtime_ns - 60 * 10**9
    os.utime(path, ns=(before, before))
    return path


def test_the_fingerprint_by_hand() -> None:
    """Two hashed tensors, sorted by hash, hashed once more."""
    one = hashlib.sha256(b'["a", "F32", [1]]\n' + bytes([0, 0, 128, 63])).digest()
    two = hashlib.sha256(b'["b", "BF16", []]\n' + bytes([128, 63])).digest()
    expected = hashlib.sha256(b"".join(sorted([one, two]))).hexdigest()
    assert StateDict({"b": torch.tensor(1.0, dtype=torch.bfloat16), "a": torch.ones(1)}).fingerprint == expected


def test_every_bit_and_name_counts(tensors: dict[str, torch.Tensor]) -> None:
    """One changed bit, name, shape or dtype of the same bytes gives another fingerprint."""
    seen = {StateDict(tensors).fingerprint}
    flat = tensors["w.torch.float16"].view(torch.uint8).view(-1)
    for byte in range(0, len(flat), 5):
        flat[byte] ^= 1 << byte % 8
        seen.add(StateDict(tensors).fingerprint)
    bias = tensors.pop("bias")
    for changed in ({"bios": bias}, {"bias": bias[None]}, {"bias": bias.view(torch.int32)}, {}):
        seen.add(StateDict(tensors | changed).fingerprint)
    assert len(seen) == 1 + 5 + 4


@pytest.mark.parametrize("dtype", sorted(MERGEABLE, key=str))
def test_nonfinite_values_are_counted(tmp_path: Path, scans: Path, dtype: torch.dtype) -> None:
    """NaN, and infinities whose sum would be hidden, are found wherever they are; the largest number is not one."""
    tensors = {name: torch.full((5_000,), torch.finfo(dtype).max, dtype=dtype) for name in ("fine", "pair", "nan")}
    tensors["pair"][17], tensors["pair"][4_999] = torch.inf, -torch.inf
    tensors["nan"][0] = torch.nan
    save_file(tensors, tmp_path / "bad.safetensors")
    aged(tmp_path / "bad.safetensors")
    for _ in range(2):  # a bad result must not come back as a good one
        for source in (tmp_path / "bad.safetensors", tensors):
            checkpoint = open_checkpoint(source)
            assert checkpoint.scan().nonfinite == {"nan": 1, "pair": 2}
            with pytest.raises(CheckpointError) as caught:
                checkpoint.check()
            message = f"{checkpoint.location!r} has NaN or Inf in 2 of 3 tensors: 'nan' (1), 'pair' (2)"
            assert str(caught.value).splitlines()[0] == message
    assert not scans.exists()


def test_a_second_run_does_not_read_again(tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good scan is kept by file identity; a damaged or foreign entry is computed again, and a changed file too."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    fingerprint = open_checkpoint(path).fingerprint
    assert not scans.exists()  # too young: it could change and keep its mtime
    reads = []
    real = TensorFile.chunks
    monkeypatch.setattr(TensorFile, "chunks", lambda self, name: reads.append(name) or real(self, name))
    aged(path)
    assert [open_checkpoint(path).fingerprint for _ in range(3)] == [fingerprint] * 3 and len(reads) == 1
    [entry] = scans.iterdir()
    good = entry.read_bytes()
    forged = json.loads(good) | {"fingerprint": "0" * 64}
    for content in (b"", good[:-2], b"[]", b"{}", good.replace(b"9", b"8"), json.dumps(forged).encode(), bytes(9)):
        reads.clear()
        entry.write_bytes(content)
        assert open_checkpoint(path).fingerprint == fingerprint and reads == ["a"]
        assert entry.read_bytes() == good
    save_file({"a": torch.zeros(3)}, path)
    assert open_checkpoint(path).fingerprint != fingerprint
    shutil.rmtree(scans)
    scans.write_text("in the way")  # a cache that cannot be written costs time, nothing else
    assert open_checkpoint(aged(path)).fingerprint != fingerprint


def test_a_file_changed_after_opening_is_refused(tmp_path: Path) -> None:
    """Also when the scan was already done."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    save_file({"a": torch.zeros(3)}, path)
    for access in (checkpoint.check, checkpoint.scan, lambda: checkpoint.fingerprint, lambda: checkpoint["a"]):
        with pytest.raises(CheckpointError, match=r"a.safetensors' changed after it was opened"):
            access()


def test_missing_names_are_key_errors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Typed for the user, and what a Mapping promises: ``get`` and ``in`` work."""
    save_file(tensors, tmp_path / "a.safetensors")
    for checkpoint in (open_checkpoint(tmp_path / "a.safetensors"), open_checkpoint(tensors)):
        for access in (checkpoint.__getitem__, checkpoint.shape, checkpoint.dtype):
            with pytest.raises(CheckpointError, match=r"^'.*' has no tensor 'other'$"):
                access("other")
        assert checkpoint.get("other") is None and "other" not in checkpoint and "bias" in checkpoint


def test_dtypes_that_torch_lacks_are_refused_on_access(tmp_path: Path) -> None:
    """Every dtype of the format opens and has a fingerprint; shape and dtype are those of the tensor read."""
    header, end = {}, 0
    for dtype, bits in BITS.items():
        header[dtype] = {"dtype": dtype, "shape": [2, 8], "data_offsets": [end, end + 2 * bits]}
        end += 2 * bits
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    checkpoint.check()
    readable = {}
    for name in checkpoint:
        if name in ("F6_E2M3", "F6_E3M2"):
            with pytest.raises(CheckpointError, match=f"a.safetensors': tensor '{name}' has dtype {name}"):
                checkpoint[name]
        else:
            readable[name] = checkpoint[name]
            assert readable[name].dtype == checkpoint.dtype(name) and readable[name].shape == checkpoint.shape(name)
    (tmp_path / "b").mkdir()
    save_file(readable, tmp_path / "b" / "model.safetensors")
    assert StateDict(readable).fingerprint == open_checkpoint(tmp_path / "b").fingerprint


def test_mappings_of_other_things() -> None:
    """Meta and sparse tensors have no values to merge; keys are text; parameters are handed out without gradient."""
    for tensor in (torch.zeros(2, device="meta"), torch.zeros(2, 2).to_sparse()):
        assert "tensor 'a' of the state dict in memory has no plain values" in refusal({"a": tensor})
    assert "'a'" in refusal({"a": [1.0]}) and "'7'" in refusal({7: torch.ones(1)}) and "no tensors" in refusal({})
    checkpoint = open_checkpoint(torch.nn.Linear(2, 2).state_dict(keep_vars=True))
    assert not checkpoint["weight"].requires_grad
    assert (
        StateDict({"a": torch.arange(6.0).view(2, 3).T}).fingerprint
        == StateDict({"a": torch.arange(6.0).view(2, 3).T.contiguous()}).fingerprint
    )
