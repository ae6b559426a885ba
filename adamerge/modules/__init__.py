"""Modules: how coefficients are searched."""

from adamerge.modules.adaptive import AdaptiveMerging
from adamerge.modules.base import MergingModule

__all__ = ["AdaptiveMerging", "MergingModule"]
