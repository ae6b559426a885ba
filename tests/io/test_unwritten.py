"""Files that are still to be written: told by their marks, in a path or an error."""

from pathlib import Path

import pytest

from adamerge.errors import ConfigError
from adamerge.io.unwritten import IMPORTANCE, PREVIOUS, RUN, is_unwritten


@pytest.mark.parametrize(
    ("path", "unwritten"),
    [
        (PREVIOUS, True), (Path(IMPORTANCE), True), (f"{RUN}/teachers", True), (FileNotFoundError(2, "no", PREVIOUS), True),
        (ConfigError("x", where=PREVIOUS), True), (None, False), ({"a": 1.0}, False), ("previous", False), ("{x}", False),
    ],
)  # fmt: skip
def test_what_no_stage_has_written_yet(path, unwritten):
    assert is_unwritten(path) is unwritten
