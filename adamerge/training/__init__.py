"""Modules: how coefficients are searched."""

from adamerge.training.adaptive import AdaptiveMerging
from adamerge.training.base import MergingModule
from adamerge.training.bilevel import BilevelMerging
from adamerge.training.schedules import CosineDecay, CosineRestarts, Schedule
from adamerge.training.teacher_cache import TeacherCache, TeacherFiles

__all__ = [
    "AdaptiveMerging",
    "BilevelMerging",
    "CosineDecay",
    "CosineRestarts",
    "MergingModule",
    "Schedule",
    "TeacherCache",
    "TeacherFiles",
]
