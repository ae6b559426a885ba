"""Files that an earlier stage of a method has yet to write: how a configuration names them until they are there."""

from __future__ import annotations

PREVIOUS = "{previous}"
"""Stands for the coefficient file of the stage before."""
IMPORTANCE = "{importance}"
"""Stands for the importances of the tensors, as the stage before found them."""
TASK_VECTORS = "{task_vectors}"
"""Stands for the file of task vectors that the last earlier stage with a solver has written."""
RUN = "{run}"
"""Stands for the folder of the run."""


def is_unwritten(path: object) -> bool:
    """Returns whether a path names what no stage has written yet.

    A part that reads a file asks this first, and where it says so stands for itself as well as it can: whoever made it
    wants to know what it would take, and whether it goes with the rest. A part that does not ask fails with an error that
    names the path, and whoever made it leaves it at that.
    """
    return any(mark in str(path) for mark in (PREVIOUS, IMPORTANCE, TASK_VECTORS, RUN))
