"""Saved data sets: folders that tell themselves how they are read, written by ``save_to_disk`` or with a card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from adamerge.data.file_faults import cause
from adamerge.errors import CheckpointError, DataError
from adamerge.io.untrusted_files import read_json

if TYPE_CHECKING:
    import datasets


def tells_itself(folder: Path, config: str | None) -> bool:
    """Returns whether a folder was saved whole, its ``README.md`` lists configurations in its head, or one is asked for."""
    if config is not None or (folder / "dataset_dict.json").is_file() or _is_one_split(folder):
        return True
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return card.startswith("---") and re.search(r"^configs:", card.split("\n---")[0], re.MULTILINE) is not None


def read_saved(folder: Path, config: str | None, where: str) -> dict[str, datasets.Dataset]:
    """Returns the splits of a folder that tells itself how it is read; one that was saved alone is ``train``.

    Raises:
        DataError: they cannot be read.
    """
    import datasets

    try:
        if (folder / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(folder)))
        if _is_one_split(folder):
            return {"train": datasets.load_from_disk(str(folder))}
        return dict(datasets.load_dataset(str(folder), config))
    except (Exception, StopIteration) as error:
        empty = _empty_splits(folder)
        reason = f"its split '{empty[0]}' is empty" if empty else cause(error)
        raise DataError(
            f"{where}: the data set {folder} cannot be read: {reason}",
            todo="save it without that split" if empty else "mend config, or save the data set again",
        ) from error


def _is_one_split(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _empty_splits(folder: Path) -> list[str]:
    """Returns the splits of a saved data set that have no rows; the library that wrote them cannot read them."""
    empty = []
    for state in sorted(folder.glob("*/state.json")):
        try:
            if not read_json(state).get("_data_files"):
                empty.append(state.parent.name)
        except CheckpointError:  # damaged: that is another reason
            continue
    return empty
