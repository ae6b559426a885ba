"""Files from outside: JSON of a bounded size, names that stay on one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adamerge.errors import CheckpointError
from adamerge.io.untrusted_files import listed, opened, quoted, read_json


def test_names_from_outside_stay_short_and_on_one_line() -> None:
    """A message that quotes them is one line, whoever wrote them."""
    assert quoted("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert quoted("x" * 600) == "'" + "x" * 500 + "'"
    assert listed("ba") == "'a', 'b'"
    assert listed(f"{number:02}" for number in range(12)).endswith("'09' and 2 more")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """Neither a folder nor a pipe, for which opening would wait for ever; each by its name."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match=f"{path}' is not a regular file"), opened(path):
            pass
    (tmp_path / "file").write_bytes(b"12")
    with opened(tmp_path / "file") as file:
        assert file.read() == b"12"


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    """Readers disagree on which of the two counts."""
    (tmp_path / "c.json").write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(CheckpointError, match=r"c.json'.*occurs twice"):
        read_json(tmp_path / "c.json")


def test_read_json(tmp_path: Path) -> None:
    """An object is read; everything else is refused in the file's name."""
    path = tmp_path / "config.json"
    for content, message in ((b"[1]", "not a JSON object"), (b"{", "not valid JSON"), (b'{"a": "' + b"x" * 99, "big")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"config.json'.*{message}"):
            read_json(path, limit=90)
    path.write_bytes(b'{"a": Infinity}')  # real configurations have it
    assert read_json(path) == {"a": float("inf")}
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "missing.json")
