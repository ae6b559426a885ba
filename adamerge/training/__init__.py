"""Training: how coefficients are found, under a Lightning trainer.

``merging.py`` says what is merged and what drives it, ``search.py`` what a search is, ``module.py`` runs it under a trainer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Bilevel": "bilevel",
    "CosineDecay": "schedules",
    "CosineRestarts": "schedules",
    "Descent": "descent",
    "Merging": "merging",
    "MergingModule": "module",
    "Schedule": "schedules",
    "Search": "search",
    "TeacherCache": "teacher_cache",
    "TeacherFiles": "teacher_cache",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from adamerge.training.bilevel import Bilevel
    from adamerge.training.descent import Descent
    from adamerge.training.merging import Merging
    from adamerge.training.module import MergingModule
    from adamerge.training.schedules import CosineDecay, CosineRestarts, Schedule
    from adamerge.training.search import Search
    from adamerge.training.teacher_cache import TeacherCache, TeacherFiles


def __getattr__(name: str) -> Any:
    # lazily: a configuration is read without Lightning
    if name not in _HOMES:
        raise AttributeError(f"module 'adamerge.training' has no attribute '{name}'")
    return getattr(importlib.import_module(f"adamerge.training.{_HOMES[name]}"), name)
