"""Training: a fit learns coefficients under a Lightning trainer, step by step.

Read ``merging.py`` first (what is merged and what drives it), then ``search.py`` (the contract of a search) with
``descent.py`` and ``bilevel.py``, and ``module.py``, which runs a search under a trainer. ``search_step.py`` has the
operations of one step, ``objective_gradient.py`` the objective over a batch.

- Before the first step: ``method_checks.py`` (of what is configured), ``fit_checks.py``, ``data_modules.py``,
  ``task_balance.py``, ``held_coefficients.py``.
- What a step is of: ``step_batches.py``, with ``teachers.py``: ``teacher_cache.py`` (each sample once), ``teacher_files.py``
  (also after the fit), ``teachers_ahead.py`` (inputs that change in every step). Which of these run together:
  ``length_groups.py``.
- During a step: ``learning_rate.py`` and ``schedules.py``, ``nonfinite_guard.py``, ``collapse_guard.py``, ``callbacks.py``,
  ``costs.py``.
- Which step is the result: ``keep_best.py`` with the rules of ``selection.py`` and ``looks.py`` (by labels or, as
  ``held_out.py`` has it, without), ``result.py``, ``batchnorm.py``. How models are scored: ``evaluation.py``, ``scorer.py``,
  ``split_scores.py``, ``confusions.py``.
- What a solver sees that needs inputs: ``solver_inputs.py``, with ``block_shortcuts.py``.
- What is written: ``run_checkpoints.py``, ``loggers.py``, ``tracker.py``, ``wandb_run.py``, ``redaction.py``.
- ``strategy.py`` is a type that the other files share.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Bilevel": "bilevel",
    "CosineDecay": "schedules",
    "CosineRestarts": "schedules",
    "Descent": "descent",
    "EqualAtStart": "task_balance",
    "Merging": "merging",
    "MergingModule": "module",
    "Schedule": "schedules",
    "Search": "search",
    "TeacherCache": "teacher_cache",
    "TeacherFiles": "teacher_files",
    "Teachers": "teachers",
    "TeachersAhead": "teachers_ahead",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from adamerge.training.bilevel import Bilevel
    from adamerge.training.descent import Descent
    from adamerge.training.merging import Merging
    from adamerge.training.module import MergingModule
    from adamerge.training.schedules import CosineDecay, CosineRestarts, Schedule
    from adamerge.training.search import Search
    from adamerge.training.task_balance import EqualAtStart
    from adamerge.training.teacher_cache import TeacherCache
    from adamerge.training.teacher_files import TeacherFiles
    from adamerge.training.teachers import Teachers
    from adamerge.training.teachers_ahead import TeachersAhead


def __getattr__(name: str) -> Any:
    # lazily: a configuration is read without Lightning
    if name not in _HOMES:
        raise AttributeError(f"module 'adamerge.training' has no attribute '{name}'")
    return getattr(importlib.import_module(f"adamerge.training.{_HOMES[name]}"), name)
