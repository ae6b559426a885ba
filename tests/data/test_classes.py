"""Classification tasks: words from the configuration, a vocabulary or the data set, in the order of the labels."""

import datasets
import pytest

from adamerge.data import TextCalibration, TextTask
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
        TextCalibration({"pets": TextTask(str(tmp_path / "pets"), classnames=["dog", "cat"])}).rows("pets", "train")
