"""Data files: by our names of splits, of any ending that says how they are read; and what is no data file."""

import bz2
import gzip
import json
import lzma
import os

import datasets
import pytest

from adamerge.data.data_files import find_files, kind_of, read_files, refuse_irregular
from adamerge.data.tables import Table
from adamerge.errors import DataError

ROWS = [{"text": f"t{number}", "label": number % 2} for number in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)).encode()
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.CSV", CSV), ("a.tsv", CSV.replace(b",", b"\t")), ("a.TSV", CSV.replace(b",", b"\t")), ("a.JSONL", LINES),
        ("a.ndjson", LINES), ("a.json", json.dumps(ROWS).encode()), ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())), ("a.csv.gz", gzip.compress(CSV)),
        ("a.tsv.GZ", gzip.compress(CSV.replace(b",", b"\t"))), ("a.csv.bz2", bz2.compress(CSV)),
        ("a.jsonl.xz", lzma.compress(LINES)), ("mark.csv", MARK + CSV), ("mark.jsonl", MARK + LINES),
        ("windows.csv", CSV.replace(b"\n", b"\r\n")), ("windows.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("blank.jsonl", LINES.replace(b"\n", b"\n\n")), ("a[1]*?.csv", CSV), ("a b.jsonl", LINES), ("v1.2.jsonl", LINES),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)  # fmt: skip
def test_every_ending_is_read_alone_and_behind_a_link(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert Table(str(tmp_path / name)).read("one")["train"].to_list() == ROWS
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / name
    link.symlink_to(tmp_path / name)
    assert Table(str(link)).read("one")["train"].to_list() == ROWS


def test_parquet_and_text(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.PARQUET")
    (tmp_path / "a.TXT").write_text("one\ntwo\n")
    assert read_files([tmp_path / "a.PARQUET"], "one").to_list() == ROWS
    assert read_files([tmp_path / "a.TXT"], "one")["text"] == ["one", "two"]


def names(folder, *own) -> dict[str, list[str]]:
    found = find_files(folder, own, "one").splits
    return {split: [str(path.relative_to(folder)) for path in paths] for split, paths in found.items()}


def made(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("path", "split"),
    [
        *(("train.jsonl", "train"), ("calibration.csv", "calibration"), ("validation.parquet", "validation")),
        *(("valid.csv", "validation"), ("dev.tsv", "validation"), ("val_1.csv", "validation"), ("Test.CSV", "test")),
        *(("calib-00000-of-00002.parquet", "calibration"), ("my_test.json.gz", "test"), ("mnist.train.csv", "train")),
        *(("calibration/part1.csv", "calibration"), ("data/dev/a.jsonl", "validation"), ("Training/a.txt", "train")),
        ("train/test.csv", "test"),  # its own name goes first
    ],
)
def test_names_of_splits(tmp_path, path, split):
    assert names(made(tmp_path, path)) == {split: [path]}


def test_the_parts_of_a_split_are_in_the_order_of_their_names(tmp_path):
    made(tmp_path, "test/b.csv", "test/a.csv", "test-2.csv", "train.csv", ".hidden/train.csv", "__pycache__/train.csv")
    assert names(tmp_path) == {"test": ["test-2.csv", "test/a.csv", "test/b.csv"], "train": ["train.csv"]}


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    made(tmp_path, "train/a.csv")
    (tmp_path / "train" / "again").symlink_to(tmp_path)
    assert names(tmp_path) == {"train": ["train/a.csv"]}


def test_files_without_such_names_are_train(tmp_path):
    made(tmp_path, "b.csv", "a.csv", "README.md", "notes.txt", "dataset_infos.json")
    assert names(tmp_path) == {"train": ["a.csv", "b.csv"]}


def test_files_that_no_name_gives_to_a_split_are_known(tmp_path):
    made(tmp_path, "train.csv", "more.csv")
    found = find_files(tmp_path, (), "one")
    assert [path.name for path in found.unread] == ["more.csv"] and list(found.splits) == ["train"]


def test_names_of_the_users_own(tmp_path):
    made(tmp_path, "fold1.csv", "fold2.csv")
    assert names(tmp_path, "fold1", "fold2") == {"fold1": ["fold1.csv"], "fold2": ["fold2.csv"]}


def test_what_a_name_leaves_open_is_asked(tmp_path):
    with pytest.raises(DataError, match=r"task 'a': train_test\.csv is named after two splits, test and train"):
        find_files(made(tmp_path / "two", "train_test.csv"), (), "task 'a'")
    with pytest.raises(DataError, match=r"task 'a': the train split in .* would be of files of several kinds"):
        find_files(made(tmp_path / "kinds", "train.csv", "train.jsonl"), (), "task 'a'")
    with pytest.raises(DataError, match=r"task 'a': the train split in .* would be of files of several kinds"):
        find_files(made(tmp_path / "plain", "a.csv", "b.jsonl"), (), "task 'a'")


def test_what_is_no_data_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")  # opened, it would be waited for
    with pytest.raises(DataError, match="task 'a': the data file .*pipe.jsonl is no regular file"):
        refuse_irregular(tmp_path / "pipe.jsonl", "task 'a'")
    for name in ("a.xlsx", "a", "a.gz"):
        with pytest.raises(DataError, match=f"task 'a': the data file .*{name} is of no known kind"):
            Table(str(made(tmp_path, name) / name)).read("a")
    assert kind_of(tmp_path / "a.gz") is None and kind_of(tmp_path / "a.TSV.gz") == ("csv", "\t")


def test_folders_of_nothing(tmp_path):
    with pytest.raises(DataError, match="task 'a': the data set .*empty is an empty folder"):
        (tmp_path / "empty").mkdir()
        Table(str(tmp_path / "empty")).read("a")
    with pytest.raises(DataError, match="task 'a': the data set .*junk cannot be read") as caught:
        Table(str(made(tmp_path / "junk", "a.bin"))).read("a")
    assert "got ['a.bin']" in str(caught.value)


def test_a_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x.jsonl" / "test.jsonl").write_bytes(LINES)
    assert Table(str(tmp_path / "x.jsonl")).read("one").keys() == {"test"}
