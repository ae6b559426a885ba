"""The rows of a split as a type: ``datasets.Dataset``, whose library is imported where rows are read and not for its name.

Classes that a configuration names take the type from here: jsonargparse executes what stands under ``TYPE_CHECKING`` in the
module of a class whose arguments it looks at, so that reading a configuration would import the library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
else:
    Dataset = Any

__all__ = ["Dataset"]
