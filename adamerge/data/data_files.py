"""Data files: which of a folder's belong to which split, by their names, and how they are read."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adamerge.data.file_faults import OPENERS, cause, fault_of
from adamerge.errors import DataError

if TYPE_CHECKING:
    import datasets

SYNONYMS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("calibration", "calib"), "calibration"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What names of files and folders may call a split."""

KINDS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **{".parquet": "parquet", ".txt": "text"},
}
"""Endings of data files, in upper or lower case, to how they are read."""

DESCRIPTIONS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class DataFiles(NamedTuple):
    """The data files of a folder.

    Attributes:
        splits: split to its files.
        unread: files that no name gives to a split, where others have such names.
    """

    splits: Mapping[str, Sequence[Path]]
    unread: Sequence[Path]


def kind_of(path: Path) -> tuple[str, str] | None:
    """Returns how a data file is read, and what separates its columns; None for other files. Compressed ones end twice."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in KINDS:
        return None
    return KINDS[suffixes[-1]], "\t" if suffixes[-1] == ".tsv" else ","


def find_files(folder: Path, own: Collection[str], where: str) -> DataFiles:
    """Returns the data files of a folder by split: of their own names, or else of the folders they are in.

    A name belongs to a split when one of its words is the split's, as of ``my_valid.csv``, ``calib-00000-of-00002.parquet``
    or ``test/part1.jsonl``. Where no file is named so, all are ``train``. Of a folder with pictures only such files as
    ``train.csv`` at its top are read, where there are any: others are notes, or belong to the reader of such folders.

    Args:
        folder: of the data set.
        own: names of splits that the task uses besides.
        where: task, for errors.

    Raises:
        DataError: a name is that of two splits, or the files of one split are of several kinds.
    """
    everything = _files(folder)
    tables = [path for path in everything if kind_of(path) is not None and path.name not in DESCRIPTIONS]
    pictures = any(path.suffix.lower() in _picture_endings() for path in everything)
    if pictures:
        tables = [path for path in tables if path.parent == folder and kind_of(path) != ("text", ",")]
    splits: dict[str, list[Path]] = {}
    for path in tables:
        name = _split_of(path.relative_to(folder), own, where)
        if name is not None:
            splits.setdefault(name, []).append(path)
    given = {path for files in splits.values() for path in files}
    unread = [path for path in tables if path not in given]
    if not splits:
        if pictures:
            return DataFiles({}, [])
        kinds = {kind_of(path) for path in tables}
        if len(kinds) > 1:  # a note beside the data
            tables = [path for path in tables if kind_of(path) != ("text", ",")]
        splits, unread = ({"train": tables} if tables else {}), []
    for name, files in splits.items():
        if len({kind_of(path) for path in files}) > 1:
            raise DataError(
                f"{where}: the {name} split in {folder} would be of files of several kinds",
                expected="one kind of files for each split",
                got=sorted(str(path.relative_to(folder)) for path in files)[:6],
                todo="keep one of them, or name one file as the data set",
            )
    return DataFiles(splits, unread)


def read_files(files: Sequence[Path], where: str) -> datasets.Dataset:
    """Reads the rows of data files of one kind.

    Raises:
        DataError: one cannot be read; it says which, where in it, and why.
    """
    try:
        return _loaded(files)
    except (Exception, StopIteration) as error:
        path, reason = _blamed(files, error)
        raise DataError(
            f"{where}: the data file {path} cannot be read: {reason}", todo="repair the file, or give another"
        ) from error


def read_pictures(folder: Path, where: str) -> dict[str, datasets.Dataset]:
    """Reads the splits of a folder of images or other files that the library knows, subfolders by our names of splits too."""
    import datasets

    if not _files(folder):
        raise DataError(f"{where}: the data set {folder} is an empty folder", todo="give a folder or file of data")
    named = {path.name: SYNONYMS.get(path.name.lower()) for path in sorted(folder.iterdir()) if path.is_dir()}
    files = None
    if "calibration" in named.values():  # the library has no such split, and would leave the folder out
        files = {split: f"{glob.escape(name)}/**" for name, split in named.items() if split is not None}
    try:
        return dict(datasets.load_dataset(str(folder), data_files=files))
    except (Exception, StopIteration) as error:
        raise DataError(
            f"{where}: the data set {folder} cannot be read: {cause(error)}",
            expected="data files (JSON, JSON lines, CSV, TSV, Parquet, text), or folders of images",
            got=sorted(path.name for path in folder.iterdir())[:6],
            todo="give a folder or file of data",
        ) from error


def refuse_irregular(path: Path, where: str) -> None:
    """Refuses what is no regular file of a kind that is read.

    Raises:
        DataError: it is not.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise DataError(f"{where}: the data file {path} is no regular file", todo="copy its content to a file")
    if kind_of(path) is None:
        endings = ", ".join(KINDS)
        raise DataError(
            f"{where}: the data file {path} is of no known kind, by its ending",
            expected=f"{endings}, also with {', '.join(OPENERS)} behind",
            got=path.suffix or "no ending",
            todo="rename it, or convert it",
        )


def _loaded(files: Sequence[Path]) -> datasets.Dataset:
    import datasets

    kind = kind_of(files[0])
    assert kind is not None
    arguments: dict[str, Any] = {"sep": kind[1]} if kind[0] == "csv" else {}
    names = [glob.escape(str(path.absolute())) for path in files]
    rows = datasets.load_dataset(kind[0], data_files={"train": names}, split="train", **arguments)
    if kind[0] == "json":  # whose reader takes any bytes for text
        rows.data.table.validate(full=True)
    return rows


def _blamed(files: Sequence[Path], error: BaseException) -> tuple[Path, str]:
    """Returns the file that an error is of, and what is wrong with it."""
    kind = kind_of(files[0])
    assert kind is not None
    if len(files) == 1:
        return files[0], fault_of(files[0], kind[0], error)
    columns: dict[Path, list[str]] = {}
    for path in files:
        try:
            columns[path] = sorted(_loaded([path]).column_names)
        except (Exception, StopIteration) as own:
            return path, fault_of(path, kind[0], own)
    other = next((path for path in files if columns[path] != columns[files[0]]), None)
    if other is not None:
        return other, f"it has columns {columns[other]}, and {files[0].name} of the same split {columns[files[0]]}"
    return files[-1], f"it does not go with the others of its split: {cause(error)}"


@cache
def _picture_endings() -> frozenset[str]:
    """Returns the endings of pictures, as the library that reads folders of them knows them."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return frozenset(ImageFolder.EXTENSIONS)


def _files(folder: Path) -> list[Path]:
    """Returns all files below a folder in the order of their names; hidden ones are left out, links are followed once."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        files += [Path(parent, name) for name in sorted(names) if not name.startswith((".", "__"))]
    return files


def _split_of(path: Path, own: Collection[str], where: str) -> str | None:
    for part in reversed(path.parts):
        stem = part.partition(".")[0]
        if stem in own:
            return SYNONYMS.get(stem, stem)
        names = {SYNONYMS[word] for word in re.split(r"[-._ 0-9]+", part.lower()) if word in SYNONYMS}
        if len(names) > 1:
            raise DataError(
                f"{where}: {path} is named after two splits, {' and '.join(sorted(names))}",
                todo="rename it, or name one file as the data set",
            )
        if names:
            return names.pop()
    return None
