"""Objectives: what drives the coefficients; one file an idea."""

from adamerge.objectives.alignment import HiddenAlignment, LogitAlignment
from adamerge.objectives.base import Objective
from adamerge.objectives.cross_entropy import CrossEntropy
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.sums import Sum

__all__ = ["CrossEntropy", "Entropy", "HiddenAlignment", "LogitAlignment", "Objective", "Sum"]
