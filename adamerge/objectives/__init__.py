"""Objectives: what drives the coefficients; one file an idea."""

from adamerge.objectives.alignment import HiddenAlignment, LogitAlignment
from adamerge.objectives.base import Course, Objective
from adamerge.objectives.cross_entropy import CrossEntropy
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.pseudo_label import PseudoLabel
from adamerge.objectives.sums import Sum
from adamerge.objectives.views import FlipAndShift, RandomOperations, Unchanged, View

__all__ = [
    "Course",
    "CrossEntropy",
    "Entropy",
    "FlipAndShift",
    "HiddenAlignment",
    "LogitAlignment",
    "Objective",
    "PseudoLabel",
    "RandomOperations",
    "Sum",
    "Unchanged",
    "View",
]
