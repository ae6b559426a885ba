"""A run's folder on disk: the names of its files, and paths inside it, which are written so that the folder can be moved."""

from __future__ import annotations

import re
from pathlib import Path

from adamerge.io.links import without_steps_back

COEFFICIENTS = "coefficients.safetensors"
"""In the folder of a run."""
CONFIG = "config.yaml"
"""Beside it, in the folder of a run."""
STAGES = "stages.json"
"""In the folder of a run of several stages, each of which is a run in a folder below it."""
THIS_RUN = "{this_run}"
"""Begins a path inside the folder of a run, in a configuration that lies there: it stands for that folder."""


def run_of(path: Path) -> Path:
    """Returns the absolute path of the run that a file lies in: of its folder, or of the one above where that is a stage."""
    folder = Path(without_steps_back(str(path.parent)))
    return folder.parent if (folder.parent / STAGES).is_file() else folder


def movable(text: str, run: Path) -> str:
    """Returns a text with ``{this_run}`` where it begins with the absolute path of a run, or has one behind a plus."""
    return re.sub(rf"(^|\+){re.escape(str(run))}(?=/|\Z)", rf"\g<1>{THIS_RUN}", text)


def resolved(text: str, run: Path) -> str:
    """Returns a text with the absolute path of a run where ``movable`` has put ``{this_run}``."""
    return re.sub(rf"(^|\+){re.escape(THIS_RUN)}(?=/|\Z)", lambda match: f"{match[1]}{run}", text)
