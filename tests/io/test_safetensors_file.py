"""Doors under attack: damaged and hostile files are told apart, and reading them takes no memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from safetensors import safe_open
from safetensors.torch import save_file

from adamerge.errors import CheckpointError
from adamerge.io.safetensors_file import TensorFile, cache_folder

HEADER = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "a": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
    "none": {"dtype": "I64", "shape": [0, 5], "data_offsets": [14, 14]},
}


def packed(header: object, data: bytes = bytes(range(14))) -> bytes:
    """Return the bytes of a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a path inside an empty folder."""
    return tmp_path / "model.safetensors"


def refusal(path: Path) -> str:
    """Open a file that must be refused, and return the message; its first line names the file."""
    with pytest.raises(CheckpointError) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value).splitlines()[0]
    return str(caught.value)


def test_a_sound_file_is_read(path: Path) -> None:
    """Names come in file order; tensors and chunks are the bytes of the file."""
    path.write_bytes(packed(HEADER))
    file = TensorFile(path)
    assert list(file.tensors) == ["b", "a", "none"] and file.metadata == {"format": "pt"}
    assert file.tensors["b"].nbytes == 8 and file.tensors["b"].numel == 2 and file.tensors["none"].numel == 0
    assert bytes(file.read("a").view(dtype=file.read("a").view(-1).dtype).untyped_storage()) == bytes(range(8, 14))
    assert file.read("none").shape == (0, 5)
    assert b"".join(bytes(chunk) for chunk in file.chunks("b", size=3)) == bytes(range(8))
    assert list(file.chunks("none")) == []
    with pytest.raises(CheckpointError, match="model.safetensors' has no tensor 'c'"):
        file.read("c")


def test_every_truncation_is_told(path: Path) -> None:
    """A file cut at any byte is refused; where the header is whole, the message counts the bytes."""
    whole = packed(HEADER)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert length < 9 or (f"got {length} bytes" in message and "truncated" in message)
    path.write_bytes(whole + b"!")
    assert "goes on after its last tensor" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (pickle.dumps({"a": [1] * 99}), "pickle"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "pickle"),
        (b"<html><body>Not Found</body></html>", "not a safetensors file"),
        ((101_000_000).to_bytes(8, "little") + b"{}", "101000000"),
        (b"", "only 0 bytes"),
        (packed(b"{" + b'"a":{' * 5000, b""), "not valid JSON"),
        (packed(b'{"a":{},"a":{}}', b""), "twice"),
        (packed(b'{"\xff":1}', b""), "not valid JSON"),
        (packed(b'{"\\ud800":1}', b""), "tensor '\\ud800'"),
        (packed({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    ],
)
def test_strangers_are_named(path: Path, content: bytes, message: str) -> None:
    """What is not safetensors is recognised, and the message says what to do."""
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype", "F17", "unknown dtype 'F17'"),
        ("dtype", ["F32"], "unknown dtype"),
        ("dtype", "F64", "does not take"),
        ("shape", [2, 2], "does not take"),
        ("shape", [True, 2], "list of sizes"),
        ("shape", [-1, -2], "list of sizes"),
        ("shape", [2**63, 2], "list of sizes"),
        ("shape", [1] * 65, "list of sizes"),
        ("data_offsets", [8, 0], "data_offsets"),
        ("data_offsets", [0], "data_offsets"),
        ("data_offsets", [4, 12], "ends at"),
        ("data_offsets", [0.0, 8.0], "data_offsets"),
        ("more", 1, "entry"),
    ],
)
def test_wrong_entries_name_the_tensor(path: Path, key: str, value: object, message: str) -> None:
    """A header that lies about one tensor is refused in that tensor's name."""
    path.write_bytes(packed(HEADER | {"b": HEADER["b"] | {key: value}}))
    first = refusal(path).splitlines()[0]
    assert message in first and ("tensor 'b'" in first or "ends at" in first)


def test_no_pickle_is_opened(path: Path, tmp_path: Path) -> None:
    """A pickle that would create a file is refused with advice, bare or zipped, and creates none."""
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return os.mkdir, (str(canary),)

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(Evil()))
    for content in (pickle.dumps(Evil()), archive.getvalue()):
        path.write_bytes(content)
        assert "if you trust who wrote it" in refusal(path) and "mkdir" in refusal(path)
    assert not canary.exists()


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    """A missing file, a folder, a pipe and an impossible path give one kind of error, and nothing hangs."""
    os.mkfifo(tmp_path / "pipe")
    assert "no such file" in refusal(tmp_path / "missing.safetensors")
    assert "not a regular file" in refusal(tmp_path)
    assert "not a regular file" in refusal(tmp_path / "pipe")
    assert "cannot be read" in refusal(tmp_path / ("n" * 300))
    with pytest.raises(CheckpointError, match="cannot be read"):
        TensorFile(tmp_path / "a\0b")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=some.lists(some.tuples(some.integers(0, 400), some.integers(0, 2), some.binary(max_size=3)), max_size=4),
    relabel=some.booleans(),
)
def test_mutated_files_are_refused_or_sound(path: Path, edits: list[tuple[int, int, bytes]], relabel: bool) -> None:
    """Whatever bytes are changed: a CheckpointError naming the file, or a file that safetensors itself accepts."""
    content = bytearray(packed(HEADER))
    for at, cut, new in edits:
        content[at : at + cut] = new
    if relabel:  # so that the header's length is right again, and the damage lies in the JSON
        content = bytearray(packed(bytes(content[8:-14]), bytes(content[-14:])))
    path.write_bytes(content)
    try:
        file = TensorFile(path)
    except CheckpointError as error:
        assert str(path) in str(error).splitlines()[0]
        return
    with safe_open(path, framework="numpy") as reference:
        assert sorted(reference.keys()) == sorted(file.tensors)


def test_a_changed_file_is_noticed(path: Path) -> None:
    """Another size, time or inode than at opening, or no file, ends every kind of access."""
    for change in (
        lambda: path.write_bytes(packed(HEADER)[:-3]),
        lambda: os.utime(path, ns=(1, 1)),
        lambda: os.replace(path.with_name("other"), path),
        path.unlink,
    ):
        path.write_bytes(packed(HEADER))
        path.with_name("other").write_bytes(packed(HEADER))
        file = TensorFile(path)
        file.check_unchanged()
        change()
        for access in (file.check_unchanged, lambda f=file: f.read("b"), lambda f=file: list(f.chunks("b"))):
            with pytest.raises(CheckpointError, match=r"model\.safetensors'"):
                access()


def test_reading_takes_no_memory_of_its_own(path: Path) -> None:
    """A 200 MB tensor, every page touched, adds nothing to the anonymous memory of the process."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [50_000_000], "data_offsets": [0, 200_000_000]}}).encode()
    path.write_bytes(packed(header, b""))
    os.truncate(path, 8 + len(header) + 200_000_000)
    file = TensorFile(path)
    file.read("a")[:1].sum()

    def anonymous() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    before = anonymous()
    tensor = file.read("a")
    assert tensor[::1024].sum() == 0
    assert anonymous() - before < 20_000
    tensor[:1] = 7  # even whoever forgets that tensors are for reading does not change the file
    assert TensorFile(path).read("a")[0] == 0


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The XDG variable is followed when it is absolute."""
    monkeypatch.setenv("HOME", "/home/somebody")
    for value, expected in (("/else", "/else/adamerge"), ("else", "/home/somebody/.cache/adamerge")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert str(cache_folder()) == expected


def test_what_was_read_does_not_stay_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor after tensor of one file, each let go: no more of it is resident than is read through one mapping."""
    monkeypatch.setattr("adamerge.io.safetensors_file.MAPPED", 8_000_000)
    path = tmp_path / "model.safetensors"
    save_file({f"{number:02}": torch.ones(1_000_000) for number in range(40)}, path)
    file = TensorFile(path)
    kept = file.read("00")

    def resident() -> int:
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    assert kept.sum() == 1_000_000
    before, most = resident(), 0
    for number in range(40):
        assert file.read(f"{number:02}").sum() == 1_000_000
        most = max(most, resident() - before)
    assert most < 40_000
    assert kept.sum() == 1_000_000  # its own mapping lives as long as it does
