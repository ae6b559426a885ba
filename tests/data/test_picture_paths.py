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
    data = ImageCalibration({"one": task(place)})
    read = {split: values(data.rows("one", split)) for split in ("calibration", "validation", "test", "train")}
    assert sorted(chain(*read.values())) == list(range(20)) and list(map(len, read.values())) == [2, 2, 4, 12]
    assert [int(label) for label in data.labels("one", "test")] == [value % 2 for value in read["test"]]


def test_paths_start_from_the_folder_of_their_file(tmp_path):
    """Both splits have a picture of that name, each beside its own table; one more lies in the folder of the data set."""
    for value, split in enumerate(("train", "test"), 1):
        picture(tmp_path / split / "x.png", value)
        (tmp_path / split / "rows.csv").write_text("image,label\nx.png,0\n../shared.png,1\nshared.png,1\n")
    picture(tmp_path / "shared.png", 9)
    splits = task(tmp_path).read("one")
    assert values(splits["train"]) == [1, 9, 9] and values(splits["test"]) == [2, 9, 9]


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
        as_pictures(numbers, "image", lambda: [], "one", "here")
    with pytest.raises(DataError, match="task 'one': org/name: column 'image' holds no pictures"):
        as_pictures(datasets.Dataset.from_dict({"image": ["a.png"]}), "image", lambda: [], "one", "org/name")
