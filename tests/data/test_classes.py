"""Classification tasks: words from the configuration, a vocabulary or the data set, in the order of the labels."""

import datasets
import pytest

from adamerge.data import TextCalibration, TextTask
from adamerge.data.vocabulary import load_vocabulary, vocabularies
from adamerge.errors import ConfigError, DataError


def test_the_configuration_comes_before_the_vocabulary():
    assert TextTask("x", vocabulary="mnist").words.classnames[0] in {"0", "zero"}
    given = TextTask("x", ["a {}"], ["one", "two"], vocabulary="mnist").words
    assert given.templates == ("a {}",) and given.classnames == ("one", "two")
    assert TextTask("x").words.classnames == ()


def test_an_unknown_vocabulary_is_a_configuration_error():
    with pytest.raises(ConfigError, match="there is no vocabulary 'minst'"):
        assert TextTask("x", vocabulary="minst").words


def test_the_same_classes_in_another_order_are_refused(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"text": ["x"], "label": [0]}, features)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "pets")
    with pytest.raises(DataError, match="has these classes in another order"):
        TextCalibration(tasks={"pets": TextTask(str(tmp_path / "pets"), classnames=["dog", "cat"])}).rows(
            "pets", "train"
        )
    as_trained = TextTask(str(tmp_path / "pets"), classnames=["dog", "cat"], as_trained=True)
    data = TextCalibration(tasks={"pets": as_trained})
    assert len(data.rows("pets", "train")) == 1 and data.tasks["pets"].classnames == ("dog", "cat")


@pytest.mark.parametrize("words", [{"templates": ["a photo"]}, {"templates": ["{x}"]}, {"classnames": ["a", "a"]}])
def test_words_of_no_use_are_refused_before_the_data_are_read(words):
    with pytest.raises(ConfigError, match="^the task of nowhere: "):
        TextTask("nowhere", **words)


@pytest.mark.parametrize("name", vocabularies())
def test_all_vocabularies_have_words_of_use(name):
    words = load_vocabulary(name)
    task = TextTask("nowhere", list(words.templates), list(words.classnames), as_trained=words.as_trained)
    assert task.words == words == TextTask("nowhere", vocabulary=name).words


def test_labels_are_told_by_the_columns_own_name(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "kind": ["cat", "cow"]})
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "pets")
    task = TextTask(str(tmp_path / "pets"), classnames=["cat", "dog"], label_column="kind")
    with pytest.raises(DataError, match=r"column 'kind' holds 'cow' in row 1 \(counted from 0\) of split 'test'"):
        TextCalibration(tasks={"pets": task}).labels("pets", "test")
