"""Class labels: numbers and names of classes; everything else is refused with task, split, column, value, row and classes."""

import datasets
import pytest

from adamerge.data.class_labels import LabelPlace, classes_of, oddity
from adamerge.data.row_numbers import numbered
from adamerge.errors import DataError

WHERE = LabelPlace("pets", "test", ("cat", "dog"), "animal")
THREE = LabelPlace("pets", "test", ("cat", "dog", "cow"), "animal")


def table(labels, feature=None):
    rows = datasets.Dataset.from_dict({"label": labels})
    return rows if feature is None else rows.cast_column("label", feature)


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([1, 0, 1], None),
        (["dog", "cat", "dog"], None),
        ([True, False, True], None),
        ([1, 0, 1], datasets.Value("uint8")),
        ([1, 0, 1], datasets.ClassLabel(names=["Katze", "Hund"])),
        (["dog", "cat", "dog"], datasets.ClassLabel(names=["cat", "dog"])),
    ],
)
def test_numbers_and_names_are_classes(labels, feature):
    assert classes_of(table(labels, feature), WHERE) == [1, 0, 1]


def test_names_that_are_digits_are_names():
    """MNIST's classes may be listed in any order."""
    assert classes_of(table(["1", "0"]), WHERE._replace(classnames=("1", "0"))) == [0, 1]


@pytest.mark.parametrize(
    ("labels", "value", "row", "advice"),
    [
        (["cat", "wolf"], "'wolf'", 1, "list classnames"),
        (["cat", "Dog"], "'Dog'", 1, "'Dog' is not 'dog'"),
        (["CAT", "DOG"], "'CAT'", 0, "'CAT' is not 'cat'"),
        (["cat", "dog "], "'dog '", 1, "'dog ' is not 'dog'"),
        (["1", "0"], "'1'", 0, "as numbers, not as text"),
        (["cat", None], "None", 1, "labels are published"),
        ([0, None], "None", 1, "labels are published"),
        ([0, -1], "-1", 1, "labels are published"),
        ([0, 1, 2], "2", 2, "list all classnames"),
        ([1, 2, 1], "2", 1, "labels begin at 1 and go to 2: subtract 1"),
        ([0, 40], "40", 1, "list all classnames"),
        ([0.0, 1.0], "0.0", 0, "whole numbers"),
        ([0.5, 1.5], "0.5", 0, "whole numbers"),
        ([float("nan"), 1.0], "nan", 0, "whole numbers"),
        ([[1], [0]], r"\[1\]", 0, "one label"),
        ([{"id": 1}], "{'id': 1}", 0, "one label"),
    ],
)  # fmt: skip
def test_everything_else_is_refused(labels, value, row, advice):
    with pytest.raises(DataError) as found:
        classes_of(numbered(table(labels), "train"), WHERE)
    assert found.match(
        rf"task 'pets', test split: column 'animal' holds {value} in row {row} \(counted from 0\) of split 'train', which is"
    )
    assert "0 to 1, or a class's name: 'cat', 'dog'" in str(found.value) and advice in found.value.todo


def test_truth_values_are_two_classes():
    with pytest.raises(DataError, match="holds True in row 0"):
        classes_of(table([True, False]), THREE)


def test_labels_begin_at_one_with_all_classes_there_and_not():
    with pytest.raises(DataError, match="holds 3 in row 2") as found:
        classes_of(table([1, 2, 3]), THREE)
    assert "labels begin at 1 and go to 3" in found.value.todo
    with pytest.raises(DataError, match="holds 4 in row 1") as found:
        classes_of(table([1, 4]), THREE)
    assert "begin at 1" not in found.value.todo


def test_a_drawn_row_is_told_as_it_was_read():
    rows = numbered(table([0, 1, 0, 7]), "train").select([0, 3])
    with pytest.raises(DataError, match="holds 7 in row 3 "):
        classes_of(rows, WHERE)


def test_without_class_names_whole_numbers_are_classes():
    nowhere = WHERE._replace(classnames=())
    assert classes_of(table([5, 0]), nowhere) == [5, 0]
    with pytest.raises(DataError, match=r"(?s)holds 'a'.*expected whole numbers from 0 on"):
        classes_of(table(["a"]), nowhere)


def test_no_column_and_one_that_is_no_labels():
    with pytest.raises(DataError, match=r"(?s)task 'pets', test split has no labels.*'animal'"):
        classes_of(table([0]).rename_column("label", "x"), WHERE)
    broken = table([{"bytes": b"no image", "path": None}]).cast_column("label", datasets.Image())
    with pytest.raises(DataError, match="column 'animal' cannot be read as labels"):
        classes_of(broken, WHERE)


def test_many_classes_are_not_all_listed():
    many = WHERE._replace(classnames=tuple(f"c{n}" for n in range(100)))
    with pytest.raises(DataError, match="'c7' and 92 more"):
        classes_of(table([100]), many)


def test_what_is_odd_is_told():
    assert oddity(table([0] * 60), THREE) == (
        "task 'pets', test split: no label of 60 is 'dog', 'cow': 2 of 3 classes. If that is not so, the labels mean other "
        "classes"
    )
    assert oddity(table([0] * 59), THREE) is None, "so few may lack one"
    assert oddity(table([0, 1, 2] * 30), THREE) is None
    line = oddity(table(["x"]), THREE)
    assert line.startswith("task 'pets', test split: column 'animal' holds 'x'") and line.endswith("cannot be scored")


def test_a_number_that_is_another_classs_name_is_refused():
    """A CSV makes numbers and truth values of texts that are names of classes."""
    for names, labels in ((["1", "2", "3"], [1, 2]), (["True", "False"], [True, False])):
        rows = datasets.Dataset.from_dict({"label": labels})
        with pytest.raises(DataError, match="the name of class 0 and the number of another"):
            classes_of(rows, LabelPlace("one", "validation", names))
    same = datasets.Dataset.from_dict({"label": [0, 1, 2]})
    assert classes_of(same, LabelPlace("one", "validation", ["0", "1", "2"])) == [0, 1, 2]
