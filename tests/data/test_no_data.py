"""No data: nothing to fit, nothing to score, and whoever asks for a task's rows is told so."""

import pytest

from adamerge.data import NoData
from adamerge.errors import DataError


def test_there_is_nothing():
    data = NoData(batch_size=4)
    assert not data.tasks and data.fitted == [] and data.labelled_tasks("test") == []
    with pytest.raises(DataError, match="no data"):
        data.rows("digits", "test")
