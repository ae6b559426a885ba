"""Questions about images: from saved data sets, and from a calibration JSON whose images are files."""

import json

import datasets
import pytest
from PIL import Image

from adamerge.data import ImageTextCalibration, ImageTextTask
from adamerge.errors import DataError


@pytest.fixture
def calibration(tmp_path):
    """Expert Merging's format; the second row has no response."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        row = {"image_path": f"pictures/{number}.png", "question": f"what is {number}?", "question_id": number}
        rows.append(row | {"task_name": "vqa", "response": None if number == 1 else f"it is {number}"})
    (tmp_path / "vqa.json").write_text(json.dumps(rows))
    return tmp_path


def samples(task):
    data = ImageTextCalibration(tasks={"vqa": task})
    rows = data.rows("vqa", "calibration")
    return [data.read("vqa", "calibration", row) for row in rows.select_columns(list(data.columns("vqa")))]


def test_a_calibration_file_is_all_calibration(calibration):
    found = samples(ImageTextTask(str(calibration / "vqa.json"), response="{response}", response_is_input=True))
    assert [sample["question"] for sample in found] == ["what is 0?", "what is 1?", "what is 2?"]
    assert [sample["image"].getpixel((0, 0))[0] for sample in found] == [0, 1, 2]
    assert found[0]["response"] == "it is 0"


def test_a_response_that_lacks_or_is_a_label_is_none(calibration):
    read = samples(ImageTextTask(str(calibration / "vqa.json"), response="{response}", response_is_input=True))
    assert [sample["response"] for sample in read] == ["it is 0", None, "it is 2"]
    labels = samples(ImageTextTask(str(calibration / "vqa.json"), response="{response}"))
    assert [sample["response"] for sample in labels] == [None] * 3 and labels[2]["question"] == "what is 2?"
    assert samples(ImageTextTask(str(calibration / "vqa.json")))[0]["response"] is None


def test_images_may_be_elsewhere(calibration, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (calibration / "vqa.json").rename(moved / "vqa.json")
    with pytest.raises(DataError, match="task 'vqa': 3 of 3 images of .* do not exist, first .*0.png"):
        samples(ImageTextTask(str(moved / "vqa.json")))
    assert len(samples(ImageTextTask(str(moved / "vqa.json"), images=str(calibration)))) == 3


def test_saved_data_sets_keep_their_splits(tmp_path):
    text = datasets.Value("string")
    features = datasets.Features({"picture": datasets.Image(), "question": text, "answer": text})
    rows = {"picture": [Image.new("RGB", (2, 2))] * 10, "question": ["q"] * 10, "answer": ["a"] * 10}
    made = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "saved")
    task = ImageTextTask(str(tmp_path / "saved"), response="{answer}", image_column="picture")
    data = ImageTextCalibration(tasks={"vqa": task})
    assert [len(data.rows("vqa", split)) for split in ("calibration", "validation", "test")] == [1, 1, 10]
    sample = data.read("vqa", "test", data.rows("vqa", "test")[0])
    assert sample["question"] == "q" and sample["response"] == "a" and sample["image"].size == (2, 2)
