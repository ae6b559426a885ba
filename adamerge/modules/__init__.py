"""Modules: how coefficients are searched."""

from adamerge.modules.adaptive import AdaptiveMerging
from adamerge.modules.base import MergingModule
from adamerge.modules.bilevel import BilevelMerging
from adamerge.modules.teachers import TeacherCache, TeacherFiles

__all__ = ["AdaptiveMerging", "BilevelMerging", "MergingModule", "TeacherCache", "TeacherFiles"]
