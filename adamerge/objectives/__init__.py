"""Objectives: what drives the coefficients; one file an idea."""

from adamerge.objectives.base import Objective
from adamerge.objectives.cross_entropy import CrossEntropy
from adamerge.objectives.entropy import Entropy

__all__ = ["CrossEntropy", "Entropy", "Objective"]
