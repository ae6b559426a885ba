"""Writing under attack: no interrupted, killed or refused write leaves half a file or folder, or takes the old one."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from adamerge.errors import ExportError
from adamerge.io.atomic import staged_file, staged_folder, write_json


def leftovers(folder: Path) -> list[str]:
    """Return names of temporaries."""
    return [path.name for path in folder.iterdir() if ".adamerge-" in path.name]


@contextmanager
def mask(value: int) -> Iterator[None]:
    """Set the umask for a while."""
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    """Return the permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def test_staged_file(tmp_path: Path) -> None:
    """Success replaces the target, with the umask's mode and through a symlink; an exception changes nothing."""
    target, link = tmp_path / "new" / "a.txt", tmp_path / "link"
    link.symlink_to(target)
    with mask(0o027), staged_file(link) as temporary:
        temporary.write_text("one")
        temporary.chmod(0o600)
        assert not target.exists()
    assert target.read_text() == "one" and mode(target) == 0o640 and link.is_symlink()
    for failure in (KeyboardInterrupt(), ZeroDivisionError()):
        with pytest.raises(type(failure)), staged_file(target) as temporary:
            temporary.write_text("two")
            raise failure
    with pytest.raises(ExportError, match="a.txt' cannot be written"), staged_file(target):
        pass  # nothing was written, so nothing may replace the target
    assert target.read_text() == "one" and leftovers(target.parent) == []


def test_staged_file_refuses(tmp_path: Path) -> None:
    """A pipe and a folder are left alone; what the system says becomes an ExportError with the target's name."""
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ExportError, match="not a regular file"), staged_file(target):
            pytest.fail("the body ran")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="a' cannot be written"), staged_file(tmp_path / "file" / "a"):
        pytest.fail("the body ran")
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    for error in (OSError(errno.ENOSPC, "full"), full):
        with pytest.raises(ExportError, match="(?s)a' cannot be written: No space left.*bytes free"):
            with staged_file(tmp_path / "a"):
                raise error
    assert leftovers(tmp_path) == []


def test_staged_folder(tmp_path: Path) -> None:
    """Everything arrives at once with the umask's modes; --overwrite replaces all; an exception changes nothing."""
    target = tmp_path / "deep" / "merged"
    with mask(0o027), staged_folder(target, overwrite=False) as folder:
        (folder / "sub").mkdir(mode=0o700)
        (folder / "sub" / "a").touch(mode=0o600)
        assert not target.exists()
    assert [mode(path) for path in (target, target / "sub", target / "sub" / "a")] == [0o750, 0o750, 0o640]
    with pytest.raises(ExportError, match="--overwrite"), staged_folder(target, overwrite=False):
        pytest.fail("the body ran")
    with pytest.raises(ZeroDivisionError), staged_folder(target, overwrite=True) as folder:
        (folder / "b").touch()
        raise ZeroDivisionError
    assert (target / "sub" / "a").exists()
    (tmp_path / "link").symlink_to(target)
    with staged_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "b").touch()
    assert os.listdir(target) == ["b"] and (tmp_path / "link").is_symlink() and leftovers(target.parent) == []


def test_staged_folder_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, files, the home and the working folder are never replaced, and the body does not run."""
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    (tmp_path / "link").symlink_to(model)
    targets = [model, model / "merged", model.parent, tmp_path / "link" / "merged", model / "model.safetensors"]
    for target in targets:
        for source in (model, tmp_path / "link"):
            with pytest.raises(ExportError, match="the input"):
                with staged_folder(target, overwrite=True, inputs=[source]):
                    pytest.fail("the body ran")
    with pytest.raises(ExportError, match="contains the input"):
        with staged_folder(model, overwrite=True, inputs=[model / "model.safetensors"]):
            pytest.fail("the body ran")
    monkeypatch.chdir(model)
    refused = {model / "model.safetensors": "not a folder", model.parent: "replaced", Path("/"): "replaced"}
    for target, message in refused.items():
        with pytest.raises(ExportError, match=message), staged_folder(target, overwrite=True):
            pytest.fail("the body ran")
    assert os.listdir(model) == ["model.safetensors"]


@pytest.mark.parametrize("broken", ["rename", "fsync"])
def test_a_failed_commit_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """When any one of the commit's renames or syncs fails, the old folder stands, and nothing else is left."""
    target, real = tmp_path / "merged", getattr(os, broken)
    target.mkdir()
    (target / "old").touch()
    for failing in range(2 if broken == "rename" else 3):
        calls = iter(range(99))

        def fail(*args: object, calls: Iterator[int] = calls, failing: int = failing) -> None:
            if next(calls) == failing:
                raise OSError(errno.EIO, "broken")
            real(*args)

        monkeypatch.setattr(os, broken, fail)
        with pytest.raises(ExportError, match="merged' cannot"), staged_folder(target, overwrite=True) as new:
            (new / "new").touch()
        assert os.listdir(target) == ["old"] and os.listdir(tmp_path) == ["merged"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_replaced_only_where_that_was_asked_for(tmp_path, overwrite):
    target = tmp_path / "merged"

    def write():
        with staged_folder(target, overwrite=overwrite) as new:
            (new / "new").touch()
            target.mkdir()
            (target / "precious").touch()

    if overwrite:
        write()
        assert os.listdir(target) == ["new"]
    else:
        with pytest.raises(ExportError, match="has appeared meanwhile, and is left as it is"):
            write()
        assert os.listdir(target) == ["precious"]
    assert os.listdir(tmp_path) == ["merged"]


CHILD = """
import itertools, os, resource, signal, sys
from pathlib import Path
from adamerge.io.atomic import staged_file, staged_folder
from adamerge.errors import ExportError
target, die_at = Path(sys.argv[1]), int(sys.argv[2])
if die_at < 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        with staged_file(target) as temporary:
            temporary.write_bytes(bytes(2000))
    except ExportError as error:
        sys.exit(str(error))
steps = itertools.count()
for name in ("mkdir", "fchmod", "fsync", "rename"):
    def step(*args, real=getattr(os, name), **more):
        if next(steps) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    setattr(os, name, step)
with staged_folder(target, overwrite=True) as folder:
    for name in "ab":
        (folder / name).write_text("new")
"""


def child(target: Path, die_at: int) -> subprocess.CompletedProcess[str]:
    """Run an export that kills itself before its n-th system call, or one under a file-size limit."""
    command = [sys.executable, "-c", CHILD, str(target), str(die_at)]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)


def test_a_killed_export_loses_nothing(tmp_path: Path) -> None:
    """Killed at each step: the target is the old, the new or absent, never half; the next export tidies up."""
    target = tmp_path / "merged"
    seen = []
    for die_at in range(99):
        target.mkdir()
        for name in "ab":
            (target / name).write_text("old")
        done = child(target, die_at)
        seen.append({(target / name).read_text() for name in "ab"} if target.exists() else None)
        with pytest.raises(ExportError, match="--overwrite"), staged_folder(target, overwrite=False):
            pytest.fail("the body ran: the old folder was not put back")
        assert len({(target / name).read_text() for name in "ab"}) == 1
        assert os.listdir(tmp_path) == ["merged"]
        for path in [*target.iterdir()]:
            path.unlink()
        target.rmdir()
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
    assert {"old"} in seen and {"new"} in seen and None in seen and seen[-1] == {"new"}
    assert all(state in ({"old"}, {"new"}, None) for state in seen)


def test_the_living_are_not_swept(tmp_path: Path) -> None:
    """Two exports to one target at a time keep out of each other's temporaries."""
    with staged_file(tmp_path / "a") as first, staged_file(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first" and leftovers(tmp_path) == []


def test_a_size_limit_is_an_export_error(tmp_path: Path) -> None:
    """A write that the system cuts off leaves the old file and a message."""
    target = tmp_path / "a"
    target.write_text("old")
    done = child(target, -1)
    assert "a' cannot be written: File too large" in done.stderr
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    """What other programs read is plain JSON: NaN and infinities are null."""
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1, (float("inf"), 2.5)], "z": {"w": -float("inf")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1, [None, 2.5]], "z": {"w": None}}
