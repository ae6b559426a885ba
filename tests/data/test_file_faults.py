"""Faults of data files: the line that is wrong, by its number, whatever the library said."""

import bz2
import gzip
import json
import lzma

import datasets
import pytest

from adamerge.data import TextCalibration, TextTask
from adamerge.data.data_files import read_files
from adamerge.data.file_faults import cause, fault_of
from adamerge.errors import DataError

ROWS = [{"text": f"t{number}", "label": number % 2} for number in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
LATIN = b"caf\xe9"
LATE = "text,label\n" + "t,1\n" * 12_000  # the library reads 10,000 rows of a CSV file at a time
BLOCKS = (json.dumps({"text": "t" * 4000, "label": 1}) + "\n") * 3000  # and 10 MiB of JSON


def refusal(path, content) -> str:
    """What is said first of a file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_files([path], "task 'one'")
    text = caught.value.what
    assert text.startswith(f"task 'one': the data file {path} cannot be read: ") and "\n" not in text
    return text.partition(" cannot be read: ")[2]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("torn.jsonl", LINES + '{"text": "abc', "line 41 is no JSON: column 10, Unterminated string starting"),
        ("torn.ndjson", LINES + "\n" + '{"text": ', "line 42 is no JSON: column 10, Expecting value"),
        ("torn.json", json.dumps(ROWS, indent=0)[:-30], "line 158 is no JSON: column 2, Expecting property name"),
        ("numbers.jsonl", "1\n2\n", "line 1 is no JSON object: 1"),
        ("twice.jsonl", '{"a": 1, "a": 2}\n', "JSON parse error: Column(/a) was specified twice in row 0"),
        ("late.jsonl", BLOCKS + '{"text": "abc", "label": "x"}\n', "line 3001: column 'label' holds 'x', a text, where"),
        ("new.jsonl", BLOCKS + '{"text": "abc", "lab": 1}\n', "line 3001 has a column 'lab', which line 1 lacks"),
        ("late.csv", LATE + "abc,x\n", "line 12002: column 'label' holds 'x', a text, where line 2 holds a whole number"),
        ("half.csv", LATE + "abc,1.5\n", "line 12002: column 'label' holds '1.5', a fraction, where line 2 holds a whole"),
        ("ragged.csv", CSV + "a,b,c,d\n", "Error tokenizing data. C error: Expected 2 fields in line 42, saw 4"),
        ("ragged.tsv", CSV.replace(",", "\t") + "a\tb\tc\n", "Expected 2 fields in line 42, saw 3"),
        ("latin.csv", CSV.encode() + LATIN + b",1\n", "line 42 is not UTF-8 (byte 0xe9); save the file as UTF-8"),
        ("latin.txt", b"a\n" + LATIN + b"\n", "line 2 is not UTF-8 (byte 0xe9)"),
        ("latin.jsonl", LINES.encode() + b'{"text": "' + LATIN + b'", "label": 1}\n', "line 41 is not UTF-8 (byte 0xe9)"),
        ("wide.csv", CSV.encode("utf-16"), "line 1 is not UTF-8 (byte 0xff)"),
        ("latin.csv.gz", gzip.compress(CSV.encode() + LATIN + b",1\n"), "line 42 is not UTF-8 (byte 0xe9)"),
        ("torn.csv.gz", gzip.compress(LATE.encode())[:-40], "it is cut short or damaged"),
        ("torn.jsonl.xz", lzma.compress(LINES.encode())[:-40], "it is cut short or damaged"),
        ("plain.jsonl.bz2", bz2.compress(b"[1"), "line 1 is no JSON: column 3, Expecting ',' delimiter"),
        *((f"empty.{ending}", b"", "it is empty") for ending in ("csv", "tsv", "json", "jsonl", "parquet", "txt")),
        ("blank.jsonl", "\n\n", "it is empty"),
        ("none.json", "[]", "it has no rows"),
        ("header.csv", "text,label\n", "it has no rows"),
        ("noise.parquet", b"PAR1" + b"x" * 50, "Parquet magic bytes not found in footer"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)  # fmt: skip
def test_the_first_line_that_is_wrong_is_named(tmp_path, name, content, said):
    assert said in refusal(tmp_path / name, content)


def test_a_parquet_file_that_was_cut_or_damaged(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "good.parquet")
    good = (tmp_path / "good.parquet").read_bytes()
    assert "Parquet magic bytes not found" in refusal(tmp_path / "cut.parquet", good[:-30])
    assert "deserialize" in refusal(tmp_path / "damaged.parquet", b"PAR1" + good[40:])


def test_of_several_files_the_one_is_named(tmp_path):
    paths = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv")]
    for path in paths:
        path.write_text(CSV)
    paths[1].write_text(CSV + "a,b,c,d\n")
    with pytest.raises(DataError, match=r"b\.csv cannot be read: .*Expected 2 fields in line 42"):
        read_files(paths, "task 'one'")
    paths[1].write_text(CSV.replace("label", "class"))
    with pytest.raises(DataError, match=r"b\.csv .*it has columns \['class', 'text'\], and a\.csv of the same split"):
        read_files(paths, "task 'one'")


def test_a_fault_reaches_the_user_with_task_and_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(LINES + ("{" if split == "test" else ""))
    data = TextCalibration(tasks={"greek": TextTask(str(tmp_path), classnames=["a", "b"])})
    with pytest.raises(
        DataError, match=r"^task 'greek', test split: the data file .*test\.jsonl cannot be read: line 41"
    ):
        data.rows("greek", "calibration")


def test_the_innermost_cause_is_told_but_not_what_a_library_hides():
    def chained(hide: bool) -> BaseException:
        try:
            try:
                raise ValueError("inner")
            except ValueError as inner:
                raise OSError("outer") from (None if hide else inner)
        except OSError as outer:
            return outer

    assert cause(chained(hide=False)) == "inner" and cause(chained(hide=True)) == "outer"
    assert cause(StopIteration()) == "StopIteration"
    assert cause(ValueError("two\n  lines")) == "two lines" and len(cause(ValueError("x" * 999))) < 310


def test_a_file_that_is_gone_meanwhile(tmp_path):
    assert fault_of(tmp_path / "gone.csv", "csv", ValueError("?")) == "No such file or directory"
