"""Settings of all data: what is out of range is refused by its name, before anything is opened."""

import inspect

import pytest

from adamerge.data import Calibration
from adamerge.data.settings import CalibrationSettings
from adamerge.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": -4}, "batch_size"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"calibration_samples": 0}, "calibration_samples"),
        ({"workers": -1}, "workers"),
        ({"shots": 0, "labelled": True}, "shots"),
        ({"unusable_share": -0.1}, "unusable_share"),
        ({"unusable_share": 1.5}, "unusable_share"),
    ],
)
def test_numbers_out_of_range(arguments, named):
    with pytest.raises(ConfigError, match=named):
        CalibrationSettings(**arguments)


def test_shots_need_labels():
    with pytest.raises(ConfigError, match="chosen by their labels") as error:
        CalibrationSettings(shots=1)
    assert error.value.expected == "labelled: true, or calibration_samples instead of shots"
    assert CalibrationSettings(shots=1, labelled=True).shots == 1


def test_they_go_by_name_alone_and_are_those_of_all_data():
    with pytest.raises(TypeError, match="positional"):
        CalibrationSettings(16)
    assert inspect.signature(Calibration) == inspect.signature(CalibrationSettings)
    assert all(one.kind is one.KEYWORD_ONLY for one in inspect.signature(Calibration).parameters.values())
