"""Calibration rows: how many inputs of train stand beside the split, which they are, and what is told of them."""

import datasets
import pytest
from conftest import CLASSES

from adamerge.data import ImageCalibration, ImageTask
from adamerge.data.calibration_rows import sizes
from adamerge.data.overlap import overlap
from adamerge.errors import ConfigError, DataError


@pytest.fixture
def data_of(image_folders):
    def make(**settings):
        tasks = {task: ImageTask(folder, ["a {}"]) for task, folder in image_folders.items()}
        return ImageCalibration(tasks=tasks, **settings)

    return make


TASK = next(iter(CLASSES))


def pixels(rows):
    return [row["image"].tobytes() for row in rows]


def test_none_of_train_by_default(data_of):
    data = data_of()
    assert len(data.rows(TASK, "calibration")) == 6 and data.protocol["calibration_split"].startswith("calibration,")
    assert "train_samples" not in data.protocol


def test_rows_of_train_stand_behind_those_of_the_split(data_of):
    data = data_of(train_samples=10)
    rows, train = pixels(data.rows(TASK, "calibration")), pixels(data.splits(TASK)["train"])
    assert rows[:6] == pixels(data_of().rows(TASK, "calibration"))
    assert len(rows) == 16 and set(rows[6:]) <= set(train) and rows[6:] != train[:10], "they are drawn"
    assert pixels(data_of(train_samples=10, seed=3, splits_seed=0).rows(TASK, "calibration"))[6:] != rows[6:]
    assert pixels(data_of(train_samples=12).rows(TASK, "calibration"))[:16] == rows, "more contain fewer"


def test_no_more_than_there_are(data_of):
    data = data_of(train_samples=1000)
    assert len(data.rows(TASK, "calibration")) == 6 + len(data.splits(TASK)["train"]) == 54
    assert data.protocol["train_samples"] == dict.fromkeys(CLASSES, 48)
    assert data.protocol["calibration_split"] == "calibration and train, labels never read"
    assert data.protocol["calibration_samples"] == dict.fromkeys(CLASSES, 54)


def test_calibration_samples_bounds_all_of_them(data_of):
    assert len(data_of(train_samples=10, calibration_samples=9).rows(TASK, "calibration")) == 9


def test_the_sizes_say_where_they_come_from(data_of):
    assert sizes(data_of(), TASK) == (
        "calibration 6 (drawn from 60 rows of train, seed 0), validation 6 (drawn), test 24 (given)"
    )
    told = sizes(data_of(train_samples=10, calibration_samples=9), TASK)
    assert told.startswith("calibration 6 (drawn from 60 rows of train, seed 0; and 10 of train; 9 of them used)")


def test_drawn_splits_keep_their_seed(data_of):
    """What a fit with another seed is calibrated on is no sample that this one is tested or validated on."""
    one = data_of()
    apart, kept = data_of(seed=1), data_of(seed=1, splits_seed=0)
    for split in ("calibration", "validation"):
        assert pixels(kept.rows(TASK, split)) == pixels(one.rows(TASK, split)) != pixels(apart.rows(TASK, split))
    assert sum(overlap(apart, "validation", one).values()) > 0 == sum(overlap(kept, "validation", one).values())
    assert kept.protocol["splits_seed"] == 0 and "splits_seed" not in one.protocol


def test_not_beside_the_transductive_setting(data_of):
    with pytest.raises(ConfigError, match="train_samples"):
        data_of(train_samples=1, transductive=True)


def test_a_data_set_without_train(image_folders, tmp_path):
    splits = datasets.load_from_disk(image_folders[TASK])
    datasets.DatasetDict({"calibration": splits["train"], "test": splits["test"]}).save_to_disk(tmp_path / "x")
    data = ImageCalibration(tasks={TASK: ImageTask(str(tmp_path / "x"), ["a {}"])}, train_samples=1)
    with pytest.raises(DataError, match="the train split is missing"):
        data.rows(TASK, "calibration")


def test_data_are_at_hand_where_their_folder_is(data_of, image_folders):
    assert all(data_of().at_hand(task) for task in CLASSES)
    gone = ImageCalibration(tasks={"a": ImageTask("/gone", ["{}"]), "b": ImageTask("org/name", ["{}"])})
    assert not gone.at_hand("a") and not gone.at_hand("b")
