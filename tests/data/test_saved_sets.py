"""Saved data sets: read as they tell, and what is wrong with those that cannot be."""

import json

import datasets
import pytest

from adamerge.data.saved_sets import tells_itself
from adamerge.data.tables import Table
from adamerge.errors import DataError

ROWS = datasets.Dataset.from_dict({"text": ["a", "b"]})


def lines(path, count: int):
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(count)))


def test_a_card_says_how_a_folder_is_read(tmp_path):
    lines(tmp_path / "one.jsonl", 20)
    lines(tmp_path / "two.jsonl", 30)
    card = "configs:\n- config_name: a\n  data_files: one.jsonl\n- config_name: b\n  data_files: two.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    assert [len(Table(str(tmp_path), config=name).read("one")["train"]) for name in "ab"] == [20, 30]
    with pytest.raises(DataError, match="task 'one': .*pick one among the available configs"):
        Table(str(tmp_path)).read("one")


def test_a_card_without_configurations_says_nothing(tmp_path):
    for text in ("# configs:", "---\nlicense: mit\n---\nconfigs:\n", ""):
        (tmp_path / "README.md").write_text(text)
        assert not tells_itself(tmp_path, None)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert not tells_itself(tmp_path, None) and tells_itself(tmp_path, "a")


def test_a_split_saved_alone_is_train(tmp_path):
    ROWS.save_to_disk(tmp_path)
    assert {split: rows["text"][:] for split, rows in Table(str(tmp_path)).read("one").items()} == {"train": ["a", "b"]}


def test_what_cannot_be_read_says_why(tmp_path):
    datasets.DatasetDict(train=ROWS, test=ROWS.select([])).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match="task 'one': the data set .*empty cannot be read: its split 'test' is empty"):
        Table(str(tmp_path / "empty")).read("one")
    datasets.DatasetDict(train=ROWS).save_to_disk(tmp_path / "torn")
    for file in (tmp_path / "torn" / "train").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DataError, match="task 'one': the data set .*torn cannot be read: ") as found:
        Table(str(tmp_path / "torn")).read("one")
    assert "occurred while generating" not in found.value.what
