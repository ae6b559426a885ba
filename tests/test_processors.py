"""The numerical tests that imitate other processors: every file that they name is there."""

from pathlib import Path

import processors


def test_every_file_is_there():
    missing = [name for name in processors.NUMERICAL if not (Path(__file__).parent / name).exists()]
    assert not missing and len(processors.NUMERICAL) > 25
