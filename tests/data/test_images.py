"""Image tasks from data sets on disk and folders of images: splits that cannot overlap, columns, class names, errors."""

import datasets
import numpy as np
import pytest
import torch
from conftest import CLASSES, noise_images
from PIL import Image

from adamerge.data import ImageCalibration, ImageTask
from adamerge.errors import ConfigError, DataError

SPLITS = ("train", "calibration", "validation", "test")


def pixels(rows) -> list[bytes]:
    return [np.asarray(image).tobytes() for image in rows["image"]]


def task(folder, **changes) -> ImageTask:
    return ImageTask(str(folder), ["a photo of {}"], **changes)


def saved(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def test_splits_are_drawn_disjoint_and_lose_nothing(image_folders):
    data = ImageCalibration(tasks={name: task(folder) for name, folder in image_folders.items()})
    for name, folder in image_folders.items():
        found = {split: pixels(data.rows(name, split)) for split in SPLITS}
        everything = [image for images in found.values() for image in images]
        assert len(set(everything)) == len(everything)
        stored = datasets.load_from_disk(folder)
        assert sorted(everything) == sorted(pixels(stored["train"]) + pixels(stored["test"]))
        assert [len(found[split]) for split in SPLITS] == [48, 6, 6, 24]
        assert found["test"] == pixels(stored["test"])


def test_splits_follow_the_seed_and_the_task_alone(image_folders):
    def drawn(seed, order=tuple(CLASSES)):
        data = ImageCalibration(tasks={name: task(image_folders[name]) for name in order}, seed=seed)
        return {name: pixels(data.rows(name, "calibration")) for name in order}

    assert drawn(0) == drawn(0, tuple(reversed(CLASSES))) and drawn(0) != drawn(1)
    assert drawn(0)["colours"] == drawn(0, ("colours",))["colours"]


def test_fractions(image_folders):
    data = ImageCalibration(
        tasks={"colours": task(image_folders["colours"])}, calibration_fraction=0.5, validation_fraction=0.25
    )
    assert [len(data.rows("colours", split)) for split in SPLITS] == [15, 30, 15, 24]


def test_splits_that_exist_are_taken_as_they_are(tmp_path):
    splits = {name: noise_images(CLASSES["colours"], 10 + seed, seed) for seed, name in enumerate(SPLITS)}
    data = ImageCalibration(tasks={"colours": task(saved(tmp_path / "a", **splits))})
    for name, rows in splits.items():
        assert pixels(data.rows("colours", name)) == pixels(rows)


def test_other_names_of_splits_and_columns(tmp_path):
    def renamed(rows):
        return rows.rename_columns({"image": "img", "label": "fine_label"})

    splits = {
        "fit": renamed(noise_images(CLASSES["colours"], 40, 0)),
        "dev": renamed(noise_images(CLASSES["colours"], 9, 1)),
    }
    folder = saved(tmp_path / "a", **splits)
    source = task(folder, train="fit", test="dev", image_column="img", label_column="fine_label")
    data = ImageCalibration(tasks={"colours": source})
    assert [len(data.rows("colours", split)) for split in SPLITS] == [32, 4, 4, 9]
    assert len(data.labels("colours", "test")) == 9 and data.tasks["colours"].classnames == tuple(CLASSES["colours"])


def test_train_and_test_may_not_be_the_same_split(tmp_path):
    """Promise 7: what is calibrated on is never what is reported on, unless the papers' setting is asked for."""
    folder = saved(tmp_path / "a", train=noise_images(CLASSES["colours"], 40, 0))
    with pytest.raises((ConfigError, DataError)):
        data = ImageCalibration(tasks={"colours": task(folder, train="train", test="train")})
        test, calibration = pixels(data.rows("colours", "test")), pixels(data.rows("colours", "calibration"))
        assert not set(test) & set(calibration)


def test_class_names_of_the_configuration_come_first(image_folders):
    own = task(image_folders["colours"], classnames=["rot", "grün", "blau"])
    assert ImageCalibration(tasks={"colours": own}).tasks["colours"].classnames == ("rot", "grün", "blau")
    plain = ImageCalibration(tasks={"colours": task(image_folders["colours"])})
    assert plain.tasks["colours"].classnames == tuple(CLASSES["colours"])


def test_a_vocabulary_fills_what_the_configuration_leaves_open(tmp_path):
    data = ImageCalibration(
        tasks={
            "a": ImageTask("nowhere", vocabulary="pcam"),
            "b": ImageTask("nowhere", ["my {}"], vocabulary="pcam"),
            "c": ImageTask("nowhere", classnames=["good", "bad"], vocabulary="pcam"),
        }
    ).tasks
    assert [task.classnames[0] for task in data.values()] == ["lymph node", "lymph node", "good"]
    assert [task.templates for task in data.values()] == [
        ("this is a photo of {}",),
        ("my {}",),
        ("this is a photo of {}",),
    ]
    with pytest.raises(ConfigError, match="no vocabulary 'pcan'"):
        ImageCalibration(tasks={"a": ImageTask("nowhere", vocabulary="pcan")})


def test_the_same_classes_in_another_order_are_refused(tmp_path):
    folder = saved(
        tmp_path / "a", train=noise_images(["sea lake", "river"], 40, 0), test=noise_images(["sea lake", "river"], 9, 1)
    )
    with pytest.raises(DataError, match=r"task 'colours'.*in another order") as found:
        ImageCalibration(tasks={"colours": task(folder, classnames=["River", "Sea_Lake"])}).rows("colours", "test")
    assert "label 0: 'sea lake'" in str(found.value) and "'River'" in str(found.value)
    for names in (["Sea_Lake", "River"], ["water", "stream"]):  # the same spelling apart, and other words
        assert ImageCalibration(tasks={"colours": task(folder, classnames=names)}).rows("colours", "test")


def test_as_many_class_names_as_classes(image_folders):
    data = ImageCalibration(tasks={"colours": task(image_folders["colours"], classnames=["a", "b"])})
    with pytest.raises(DataError, match=r"task 'colours': 2 class names.*colours") as found:
        data.rows("colours", "calibration")
    assert "expected 3 class names, got 2" in str(found.value)


def test_truth_values_are_labels(tmp_path):
    def truths(count, seed):
        return noise_images(["no", "yes"], count, seed).cast_column("label", datasets.Value("bool"))

    folder = saved(tmp_path / "a", train=truths(40, 0), test=truths(9, 1))
    data = ImageCalibration(tasks={"colours": task(folder, vocabulary="pcam")})
    labels = [data.labels("colours", "test")[i] for i in range(9)]
    assert [int(label) for label in labels] == list(datasets.load_from_disk(folder)["test"]["label"])
    assert {label.dtype for label in labels} == {torch.int64}


def test_labels_without_names_need_class_names(tmp_path):
    def bare(count, seed):
        return noise_images(CLASSES["colours"], count, seed).cast_column("label", datasets.Value("int64"))

    folder = saved(tmp_path / "a", train=bare(40, 0), test=bare(9, 1))
    with pytest.raises(DataError, match=r"task 'colours'.*no classes"):
        assert ImageCalibration(tasks={"colours": task(folder)}).tasks
    assert ImageCalibration(tasks={"colours": task(folder, classnames=["a", "b", "c"])}).tasks


def test_folders_of_images(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for n in range(count):
                image = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                image.save(tmp_path / "pets" / split / name / f"{n}.png")
    data = ImageCalibration(tasks={"pets": task(tmp_path / "pets")})
    assert data.tasks["pets"].classnames == ("cat", "dog")
    assert [len(data.rows("pets", split)) for split in SPLITS] == [32, 4, 4, 8]
    assert sorted(map(int, data.labels("pets", "test"))) == [0] * 4 + [1] * 4


def test_folders_of_images_by_our_names_of_splits(tmp_path):
    """The library that reads them knows no calibration split; the classes are those of all splits together."""
    for number, (split, names) in enumerate(
        {"train": ("cat", "dog"), "calibration": ("dog",), "Valid": ("cat",), "test": ("cat", "dog")}.items()
    ):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(number + 1):
                Image.new("RGB", (4, 4), (number, n, 0)).save(tmp_path / split / name / f"{n}.png")
    data = ImageCalibration(tasks={"pets": task(tmp_path)})
    assert [len(data.rows("pets", split)) for split in SPLITS] == [2, 2, 3, 8]
    assert data.rows("pets", "calibration")[:]["label"] == [1, 1] and data.tasks["pets"].classnames == ("cat", "dog")


def test_a_data_set_saved_without_splits_is_one_that_the_others_are_drawn_from(tmp_path):
    noise_images(CLASSES["colours"], 40, 0).save_to_disk(tmp_path / "flat")
    data = ImageCalibration(tasks={"colours": task(tmp_path / "flat")})
    assert [len(data.rows("colours", split)) for split in SPLITS] == [24, 4, 4, 8]


def test_what_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "gone"):
        with pytest.raises(DataError, match=rf"task 'colours'.*{place.name}"):
            ImageCalibration(tasks={"colours": task(place)}).rows("colours", "test")


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_column_that_lacks(column, tmp_path):
    rows = noise_images(CLASSES["colours"], 40, 0).remove_columns(column)
    folder = saved(tmp_path / "a", train=rows, test=rows)
    with pytest.raises(DataError, match=rf"task 'colours'.*no column '{column}'"):
        ImageCalibration(tasks={"colours": task(folder)}).rows("colours", "test")


@pytest.mark.parametrize(
    "arguments",
    [
        {"tasks": {}},
        {"calibration_fraction": 0.0},
        {"validation_fraction": -0.1},
        {"calibration_fraction": 0.6, "validation_fraction": 0.4},
        {"test_fraction": 0.0},
        {"test_fraction": 1.0},
    ],
)
def test_numbers_out_of_range(arguments, image_folders):
    tasks = {"colours": task(image_folders["colours"])}
    with pytest.raises(ConfigError):
        ImageCalibration(**{"tasks": tasks, **arguments})


def test_a_fraction_that_rounds_to_nothing_is_an_error_and_not_an_empty_split(tmp_path):
    rows = noise_images(CLASSES["colours"], 4, 0)
    data = ImageCalibration(tasks={"colours": task(saved(tmp_path / "a", train=rows, test=rows))})
    with pytest.raises(DataError, match=r"task 'colours': the calibration split is empty"):
        data.rows("colours", "calibration")
