"""Writing: a file or folder appears whole or not at all, and what stood there before stays until then."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from platform import node
from typing import Any

from safetensors import SafetensorError

from adamerge.errors import ExportError
from adamerge.io.untrusted_files import quoted

_HOST = hashlib.sha256(node().encode()).hexdigest()[:6]  # a process id means nothing on another machine


def _sibling(target: Path, ending: str) -> Path:
    # begins with the target's name, so that a person sees whose it is; cut, because names have a limit
    return target.with_name(f".{target.name[:40]}.adamerge-{os.getpid()}-{_HOST}-{secrets.token_hex(4)}{ending}")


def _sweep(target: Path) -> None:
    """Removes what killed writers of this target left behind; put back an old folder that one had just moved aside."""
    mine = re.compile(re.escape(f".{target.name[:40]}.adamerge-") + rf"(\d+)-{_HOST}-[0-9a-f]{{8}}\.(tmp|old)")
    for path in sorted(target.parent.iterdir()):
        match = mine.fullmatch(path.name)
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not os.path.lexists(target):
            os.rename(path, target)
        else:
            _remove(path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(path: Path, mode: int | None = None) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        if mode is not None:
            os.fchmod(handle, mode)
        os.fsync(handle)
    except OSError as error:
        # some network file systems cannot sync a folder; every other failure means that data may be lost
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def _settle(root: Path) -> None:
    """Gives a file, or a folder and all in it, the modes that the umask asks for, and push it to the disk."""
    mask = os.umask(0o077)  # asking means setting; the strict one, in case another thread creates a file just now
    os.umask(mask)
    for path in [*sorted(root.rglob("*"), reverse=True), root]:  # a folder after what it holds
        if not path.is_symlink():
            _sync(path, (0o777 if path.is_dir() else 0o666) & ~mask)


@contextmanager
def _export_errors(target: Path) -> Iterator[None]:
    """Turns what the system says while ``target`` is written into an ExportError; `SafetensorError` says it in text."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        match = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
        reason = os.strerror(code) if code else str(error)
        where, todo = getattr(error, "filename", None), None
        if code in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(folder for folder in target.absolute().parents if folder.exists())).free
            where, todo = f"{where or target}, with {free:,} bytes free", "make room, or write to another disk"
        raise ExportError(f"{quoted(target)} cannot be written: {reason}", where=where, todo=todo) from error


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yields a path to write to, beside ``target``; on success it replaces ``target``, on an exception it is removed.

    The yielded path does not exist yet. A symlink is followed, missing parents are created, the mode follows the umask,
    file and folder are synced. Whatever cannot be written is an ExportError naming the target.
    """
    with _export_errors(target):
        target = Path(os.path.realpath(target))
        if os.path.lexists(target) and not target.is_file():
            raise ExportError(f"{quoted(target)} is not a regular file, and is left as it is")
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary = _sibling(target, ".tmp")
        try:
            temporary.touch()  # a folder that cannot be written to is found before the work, not after
            temporary.unlink()
            yield temporary
            _settle(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        finally:
            _remove(temporary)


def _refuse_inputs(target: Path, inputs: Sequence[Path]) -> None:
    for source in inputs:
        for place in {Path(os.path.abspath(source)), Path(os.path.realpath(source))}:
            if target.is_relative_to(place) or place.is_relative_to(target):
                relation = "is" if target == place else "is inside" if target.is_relative_to(place) else "contains"
                what = f"{quoted(target)} {relation} the input {quoted(source)}"
                raise ExportError(what, todo="write to another folder")


@contextmanager
def staged_folder(target: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yields an empty folder beside ``target``; on success it takes the place of ``target``, on an exception it goes.

    ``target`` is absent or complete at any moment, and with ``overwrite`` the old folder is deleted only when the new
    one stands. ExportError, before any work: ``target`` exists and ``overwrite`` is off; it is, is inside, or contains
    one of ``inputs``; it is no folder, a mount point, or holds the home or working folder; it cannot be written.
    """
    with _export_errors(target):
        target = Path(os.path.realpath(target))
        _refuse_inputs(target, inputs)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        if os.path.lexists(target):
            if not target.is_dir():
                raise ExportError(f"{quoted(target)} is not a folder, and is left as it is")
            if not overwrite:
                raise ExportError(f"{quoted(target)} exists", todo="pass --overwrite to replace it, or name another")
            # a mount point cannot be renamed; the others are never an old model, and all in them would be deleted
            protected = (Path.cwd(), Path(os.path.realpath(os.path.expanduser("~"))))
            if os.path.ismount(target) or any(place.is_relative_to(target) for place in protected):
                raise ExportError(f"{quoted(target)} cannot be replaced", todo="name a folder inside it")
        temporary = _sibling(target, ".tmp")
        temporary.mkdir()
        try:
            yield temporary
            _settle(temporary)
            _put_in_place(temporary, target, overwrite)
        finally:
            _remove(temporary)


def _put_in_place(new: Path, target: Path, overwrite: bool) -> None:
    old = _sibling(target, ".old")
    if os.path.lexists(target) and not overwrite:  # it was not there when the work began
        raise ExportError(
            f"{quoted(target)} has appeared meanwhile, and is left as it is", todo="pass --overwrite, or name another"
        )
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        _sync(target.parent)
    except BaseException:
        if not new.exists():
            os.rename(target, new)
        if old.exists():
            os.rename(old, target)
        raise
    _remove(old)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON atomically; NaN becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with staged_file(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
