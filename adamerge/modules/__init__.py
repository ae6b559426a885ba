"""Modules: how coefficients are searched."""

from adamerge.modules.adaptive import AdaptiveMerging
from adamerge.modules.base import MergingModule
from adamerge.modules.bilevel import BilevelMerging
from adamerge.modules.schedules import CosineDecay, CosineRestarts, Schedule
from adamerge.modules.teachers import TeacherCache, TeacherFiles

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
