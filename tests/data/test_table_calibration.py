"""Calibration data in tables: what is there is taken as it is, what lacks is drawn, and both are told."""

import datasets
import pytest

from adamerge.data import TextCalibration, TextTask
from adamerge.errors import DataError

from .test_tables import lines, rows

SPLITS = ("calibration", "validation", "test", "train")


def calibration(dataset, table=(), **arguments) -> TextCalibration:
    return TextCalibration(tasks={"greek": TextTask(str(dataset), classnames=["a", "b"], **dict(table))}, **arguments)


def numbers(data, split) -> list[int]:
    return [int(text) for text in data.splits("greek")[split]["text"]]


@pytest.mark.parametrize(
    ("seed", "drawn"),
    [
        (
            0,
            (
                [70, 42, 9, 104, 50, 64, 6, 131, 26, 2, 20, 46, 105, 11],
                [54, 22, 63, 97, 107, 71, 81, 77, 73, 30, 44, 113, 91, 114],
            ),
        ),
        (
            7,
            (
                [100, 124, 116, 43, 19, 46, 91, 129, 56, 12, 75, 69, 60, 130],
                [1, 120, 47, 111, 125, 81, 8, 99, 33, 104, 121, 102, 117, 74],
            ),
        ),
    ],
)
def test_the_same_rows_are_drawn_as_by_every_version_before(tmp_path, seed, drawn):
    """Whether the test split is given or drawn too: published figures rest on these rows."""
    datasets.DatasetDict(train=rows(137), test=rows(9, 1000)).save_to_disk(tmp_path / "given")
    for dataset in (tmp_path / "given", lines(tmp_path / "alone.jsonl", 137)):
        data = calibration(dataset, seed=seed)
        assert (numbers(data, "calibration"), numbers(data, "validation")) == drawn


def test_one_file_is_calibrated_on_validated_and_tested_disjointly(tmp_path):
    data = calibration(lines(tmp_path / "greek.jsonl", 100))
    drawn = {split: numbers(data, split) for split in SPLITS}
    assert list(map(len, drawn.values())) == [10, 10, 20, 60]
    assert sorted(number for found in drawn.values() for number in found) == list(range(100))
    assert data.protocol["drawn_from_train"] == {"greek": {"calibration": 10, "validation": 10, "test": 20, "of": 100}}
    assert data.labelled_tasks("test") == ["greek"] and data.protocol["seed"] == 0
    assert data.notices() == [
        "greek: calibration 10 (drawn from 100 rows of train, seed 0), validation 10 (drawn), test 20 (drawn)"
    ]


def test_shares_are_declared(tmp_path):
    place = lines(tmp_path / "greek.jsonl", 100)
    for shares, sizes in (
        ({"test_fraction": 0.5, "calibration_fraction": 0.3}, [30, 10, 50, 10]),
        ({"calibration_fraction": 0.85}, [85, 10, 5, 0]),
    ):
        data = calibration(place, **shares)
        assert [len(numbers(data, split)) for split in SPLITS] == sizes


@pytest.mark.parametrize("given", [("calibration",), ("validation",), ("calibration", "test"), SPLITS[:3], ()])
def test_only_a_split_that_is_missing_is_drawn(tmp_path, given):
    """Each file has rows of its own, so that where a row came from can be told."""
    starts = {split: 1000 * (place + 1) for place, split in enumerate(given)}
    for split, start in starts.items():
        lines(tmp_path / f"{split}.jsonl", 7, start)
    lines(tmp_path / "train.jsonl", 40)
    data = calibration(tmp_path)
    for split, share in (("calibration", 4), ("validation", 4), ("test", 8)):
        found = numbers(data, split)
        if split in given:
            assert found == list(range(starts[split], starts[split] + 7)), "as the file has them"
        else:
            assert len(found) == share and max(found) < 40
    together = [number for split in SPLITS for number in numbers(data, split)]
    assert len(set(together)) == len(together) and set(range(40)) <= set(together)
    told = data.notices()[0]
    assert told.count("(given)") == len(given) and told.count("rows of train, seed 0") == (len(given) < 3)
    assert ("drawn_from_train" in data.protocol) == (len(given) < 3)


def test_a_calibration_file_needs_no_labels(tmp_path):
    for split in SPLITS:
        lines(tmp_path / f"{split}.jsonl", 8)
    (tmp_path / "calibration.jsonl").write_text('{"text": "one"}\n')
    assert "label" not in calibration(tmp_path).rows("greek", "calibration").column_names


def test_splits_of_other_names(tmp_path):
    datasets.DatasetDict(train=rows(40), dev=rows(6, 1000), test=rows(9, 2000)).save_to_disk(tmp_path / "dev")
    assert numbers(calibration(tmp_path / "dev"), "validation") == list(range(1000, 1006))
    lines(tmp_path / "mine" / "fit.jsonl", 40)
    lines(tmp_path / "mine" / "valid.jsonl", 6, 1000)
    data = calibration(tmp_path / "mine", {"train": "fit", "test": "valid"})
    assert numbers(data, "test") == list(range(1000, 1006)) and len(numbers(data, "train")) == 32


@pytest.mark.parametrize("key", ["test", "train"])
def test_a_named_split_that_there_is_not_is_refused_and_not_drawn(tmp_path, key):
    for split in ("train", "test"):
        lines(tmp_path / f"{split}.jsonl", 8)
    with pytest.raises(DataError, match=f"task 'greek': .* has no split 'mine', which {key} names") as found:
        calibration(tmp_path, {key: "mine"}).splits("greek")
    assert "'test'" in str(found.value) or "'train'" in str(found.value)


def test_what_is_not_read_is_told(tmp_path):
    for name in ("train", "test", "more"):
        lines(tmp_path / f"{name}.jsonl", 40)
    assert calibration(tmp_path).notices()[1:] == ["greek: not read, since no name says of which split: more.jsonl"]
