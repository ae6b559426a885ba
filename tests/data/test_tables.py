"""Tables: where rows come from, and what is said when they do not."""

import csv

import datasets
import pytest

from adamerge.data.tables import Table
from adamerge.errors import DataError


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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="task 'one': the data set nowhere/nothing cannot be read"):
        Table("nowhere/nothing").read("one")


def test_a_column_that_lacks_is_named():
    with pytest.raises(DataError, match="task 'one': split 'test' of here has no column 'b'"):
        Table("here").need("one", "test", datasets.Dataset.from_dict({"a": [1]}), ["a", "b"])
