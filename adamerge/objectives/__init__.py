"""Objectives: what drives the coefficients; one file an idea."""

from adamerge.objectives.alignment import HiddenAlignment, LogitAlignment, SummedHiddenAlignment
from adamerge.objectives.base import Course, Objective
from adamerge.objectives.cross_entropy import CrossEntropy
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.marginal_entropy import MarginalEntropy
from adamerge.objectives.pseudo_label import PseudoLabel
from adamerge.objectives.random_operations import RandomOperations
from adamerge.objectives.trust import SurestOfAll, SurestOfPredicted, Trust
from adamerge.objectives.views import CropAndFlip, FlipAndShift, Unchanged, View
from adamerge.objectives.weighted_sum import Sum

__all__ = [
    "Course",
    "CropAndFlip",
    "CrossEntropy",
    "Entropy",
    "FlipAndShift",
    "HiddenAlignment",
    "LogitAlignment",
    "MarginalEntropy",
    "Objective",
    "PseudoLabel",
    "RandomOperations",
    "Sum",
    "SummedHiddenAlignment",
    "SurestOfAll",
    "SurestOfPredicted",
    "Trust",
    "Unchanged",
    "View",
]
