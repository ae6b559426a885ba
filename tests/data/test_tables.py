"""Tables: where rows come from, and what is said when they do not."""

import csv
import json
import shutil

import datasets
import pytest

from adamerge.data.tables import Table
from adamerge.errors import DataError


def rows(count: int, start: int = 0) -> datasets.Dataset:
    """Texts that are their own numbers."""
    return datasets.Dataset.from_dict(
        {"text": [str(start + number) for number in range(count)], "label": [number % 2 for number in range(count)]}
    )


def lines(path, count: int, start: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, start)))
    return path


def test_a_folder_of_data_files_and_a_file_are_read(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["a", 0], ["b", 1]])
    for source in (tmp_path, tmp_path / "rows.csv"):
        splits = Table(str(source)).read("one")
        assert splits["train"]["text"] == ["a", "b"]


def test_a_saved_data_set_is_read_as_it_is(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"mine": rows}).save_to_disk(tmp_path / "saved")
    assert Table(str(tmp_path / "saved")).read("one").keys() == {"mine"}


def test_what_cannot_be_read_names_task_and_source(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="task 'one': the data set nowhere/nothing cannot be read"):
        Table("nowhere/nothing").read("one")


def test_a_column_that_lacks_is_named():
    with pytest.raises(DataError, match="task 'one': split 'test' of here has no column 'b'"):
        Table("here").need("one", "test", datasets.Dataset.from_dict({"a": [1]}), ["a", "b"])


def test_a_missing_folder_is_not_looked_for_in_the_cache(tmp_path, monkeypatch):
    """The library keeps what it read under the last part of its path, and offline gives it out again under that name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "cars" / "train.jsonl", 20)
    lines(tmp_path / "data" / "cars" / "train.jsonl", 20)
    datasets.load_dataset("cars")
    shutil.rmtree(tmp_path / "cars")
    shutil.rmtree(tmp_path / "data" / "cars")
    assert len(datasets.load_dataset("cars")["train"]) == 20, "the library does so"
    for name in ("cars", "./cars", "data/cars"):
        with pytest.raises(DataError, match=f"task 'one': the data set {name} cannot be read: there is no {tmp_path}"):
            Table(name).read("one")


def test_a_hub_id_that_is_not_given_says_both(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"there is no {tmp_path}/data/cars, and Couldn't reach 'data/cars' on the Hub"):
        Table("data/cars").read("one")
