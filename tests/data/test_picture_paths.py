"""Columns of paths: found beside the table, opened as pictures, never downloaded."""

import csv
import json
from itertools import chain

import datasets
import pytest
from PIL import Image

from adamerge.data import ImageCalibration, ImageTask
from adamerge.data.picture_paths import as_pictures
from adamerge.errors import DataError


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)
    return path


def task(dataset) -> ImageTask:
    return ImageTask(str(dataset), ["a photo of {}"], ["a", "b"])


def values(rows) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in rows["image"]]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_of_paths_is_a_table_of_pictures(tmp_path, ending):
    rows = []
    for number in range(20):
        picture(tmp_path / "pictures" / f"{number}.png", number)
        rows.append({"image": f"pictures/{number}.png", "label": number % 2})
    place = tmp_path / f"rows.{ending}"
    if ending == "csv":
        with place.open("w", newline="") as file:
            csv.writer(file).writerows([["image", "label"], *(row.values() for row in rows)])
    elif ending == "jsonl":
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(place)
    data = ImageCalibration(tasks={"one": task(place)})
    read = {split: values(data.rows("one", split)) for split in ("calibration", "validation", "test", "train")}
    assert sorted(chain(*read.values())) == list(range(20)) and list(map(len, read.values())) == [2, 2, 4, 12]
    assert [int(label) for label in data.labels("one", "test")] == [value % 2 for value in read["test"]]


def test_paths_start_from_the_folder_of_their_file(tmp_path):
    """Each table has a picture of that name beside it, and one that lies above."""
    for value, name in enumerate(("one", "two"), 1):
        picture(tmp_path / name / "x.png", value)
        (tmp_path / name / "rows.csv").write_text("image,label\nx.png,0\n../shared.png,1\n")
    picture(tmp_path / "shared.png", 9)
    for value, name in enumerate(("one", "two"), 1):
        assert values(task(tmp_path / name / "rows.csv").read("one")["train"]) == [value, 9]


def test_tables_by_split_beside_their_pictures(tmp_path):
    """Lists of a folder of pictures that are no tables of it are left alone."""
    for number in range(4):
        picture(tmp_path / "pictures" / f"{number}.png", number)
    for number, split in enumerate(("train", "calibration", "valid", "test")):
        (tmp_path / f"{split}.csv").write_text(f"image,label\npictures/{number}.png,0\n")
    (tmp_path / "train.txt").write_text("pictures/0\n")
    data = ImageCalibration(tasks={"one": task(tmp_path)})
    assert [values(data.rows("one", split)) for split in ("train", "calibration", "validation", "test")] == [
        [0],
        [1],
        [2],
        [3],
    ]


def test_a_folder_of_pictures_keeps_its_own_reader(tmp_path):
    """Whose labels are names of folders, or in ``metadata``, whatever lists lie in it."""
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            picture(tmp_path / "classes" / split / name / "x.png", number)
        (tmp_path / "classes" / split / "labels.csv").write_text("file,label\nx.png,0\n")
        (tmp_path / "classes" / f"{split}.txt").write_text("cat/x\n")
        picture(tmp_path / "named" / split / "x.png", 1)
        (tmp_path / "named" / split / "metadata.jsonl").write_text('{"file_name": "x.png", "label": 1}\n')
    read = task(tmp_path / "classes").read("one")
    assert read["test"].features["label"].names == ["cat", "dog"] and values(read["test"]) == [0, 1]
    read = task(tmp_path / "named").read("one")
    assert read["train"]["label"] == [1] and values(read["test"]) == [1]


def test_absolute_paths_and_rows_without_one(tmp_path):
    path = picture(tmp_path / "elsewhere" / "x.png", 5)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text(f'{{"image": "{path}", "label": 0}}\n{{"image": null, "label": 1}}\n')
    rows = task(tmp_path / "rows" / "a.jsonl").read("one")["train"]
    assert rows[0]["image"].getpixel((0, 0))[0] == 5 and rows[1]["image"] is None


def test_bytes_are_pictures_too(tmp_path):
    content = picture(tmp_path / "x.png", 7).read_bytes()
    rows = datasets.Dataset.from_list([{"image": content, "label": 0}])
    rows.to_parquet(tmp_path / "bytes.parquet")
    assert values(task(tmp_path / "bytes.parquet").read("one")["train"]) == [7]
    pair = datasets.Dataset.from_list([{"image": {"bytes": content, "path": None}, "label": 0}])
    pair.to_parquet(tmp_path / "pair.parquet")
    assert values(task(tmp_path / "pair.parquet").read("one")["train"]) == [7]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("gone.png", "task 'one': 1 of 2 images of .*rows.csv do not exist, first .*gone.png"),
        ("https://example.org/x.png", "row 1 names a picture by an address, https://example.org/x.png"),
        ("S3://bucket/x.png", "row 1 names a picture by an address"),
    ],
)
def test_pictures_that_are_not_there(tmp_path, cell, said):
    picture(tmp_path / "x.png", 1)
    (tmp_path / "rows.csv").write_text(f"image,label\nx.png,0\n{cell},1\n")
    with pytest.raises(DataError, match=said):
        task(tmp_path / "rows.csv").read("one")


def test_numbers_and_a_data_set_without_a_folder_hold_no_pictures():
    numbers = datasets.Dataset.from_dict({"image": [1, 2]})
    with pytest.raises(DataError, match="task 'one': here: column 'image' holds no pictures"):
        as_pictures(numbers, "image", lambda: [], task="one", dataset="here")
    with pytest.raises(DataError, match="task 'one': org/name: column 'image' holds no pictures"):
        as_pictures(
            datasets.Dataset.from_dict({"image": ["a.png"]}), "image", lambda: [], task="one", dataset="org/name"
        )
