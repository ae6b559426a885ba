"""Row numbers: those of the file as read, after drawing, shuffling and slicing; and the path of a picture."""

import datasets
import pytest
from PIL import Image

from adamerge.data.row_numbers import described, numbered


@pytest.mark.parametrize(
    "draw",
    [
        lambda rows: rows.select([7, 3, 5]),
        lambda rows: rows.select(range(7, 10)),  # a slice has no table of indices
        lambda rows: rows.shuffle(seed=1).select([2, 0]).select([1]),
        lambda rows: rows.train_test_split(0.3, seed=0)["test"],
        lambda rows: rows.rename_column("text", "words").cast_column("words", datasets.Value("large_string")),
        lambda rows: datasets.concatenate_datasets([rows.select([4]), rows.select([9])]),
    ],
)
def test_numbers_survive_what_is_done_to_rows(draw):
    rows = draw(numbered(datasets.Dataset.from_dict({"text": [f"t{n}" for n in range(10)]}), "train"))
    texts = rows["text" if "text" in rows.column_names else "words"]
    for index, text in enumerate(texts):
        assert described(rows, index) == f"row {text[1:]} (counted from 0) of split 'train'"


def test_rows_of_a_saved_data_set_that_was_shuffled_before_are_numbered_as_they_are_read(tmp_path):
    rows = datasets.Dataset.from_dict({"text": list("abc")}).select([2, 0, 1])
    rows.save_to_disk(tmp_path / "rows")
    for read in (rows, datasets.load_from_disk(tmp_path / "rows")):
        assert described(numbered(read, "dev").select([2]), 0) == "row 2 (counted from 0) of split 'dev'"


def test_rows_without_numbers_are_told_by_their_index():
    assert described(datasets.Dataset.from_dict({"text": ["a", "b"]}), 1) == "row 1"


def test_the_path_of_a_picture_is_told_where_there_is_one(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"")
    paths = [str(tmp_path / "a.png"), str(tmp_path / "broken.png")]
    rows = datasets.Dataset.from_dict({"image": paths, "n": [0, 1]}).cast_column("image", datasets.Image())
    assert described(rows, 1, ["image", "n"]) == f"row 1, picture {paths[1]}"
    inside = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (2, 2)), None]}, datasets.Features(image=datasets.Image())
    )
    assert [described(inside, n, ["image"]) for n in (0, 1)] == ["row 0", "row 1"]
