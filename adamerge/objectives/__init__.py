"""Objectives: the losses of the merged model that drive its coefficients, one idea per file.

Read ``base.py`` first: the contract, from one forward pass to one loss per sample. ``entropy.py`` is AdaMerging's and the
simplest, ``marginal_entropy.py`` spreads the predictions; ``cross_entropy.py`` needs labels, ``alignment.py`` and
``expert_labels.py`` the experts as teachers, and ``chosen_samples.py`` says which samples count. ``pseudo_label.py`` learns
from its own predictions, of samples that ``trust.py`` chooses. ``weighted_sum.py`` adds several objectives up, and
``penalties.py`` looks at the coefficients alone.

How samples are changed anew in each step, for whoever looks at them: ``views.py`` has the contract, ``random_operations.py``,
``affine_photometric.py`` and ``mixing.py`` are for images, ``text_views.py`` for texts.
"""

from adamerge.objectives.affine_photometric import AffinePhotometric
from adamerge.objectives.alignment import (
    HiddenAlignment,
    LogitAlignment,
    NormalisedHiddenAlignment,
    SummedHiddenAlignment,
)
from adamerge.objectives.base import Course, Objective
from adamerge.objectives.chosen_samples import WeightedByConfidence, WhereAgreed
from adamerge.objectives.cross_entropy import CrossEntropy
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.expert_labels import ExpertLabels
from adamerge.objectives.marginal_entropy import MarginalEntropy
from adamerge.objectives.mixing import MixInputs
from adamerge.objectives.pseudo_label import PseudoLabel
from adamerge.objectives.random_operations import RandomOperations
from adamerge.objectives.text_views import SpanCrop, TokenDropout, TokenMasking
from adamerge.objectives.trust import SurestOfAll, SurestOfPredicted, Trust
from adamerge.objectives.views import Composed, CropAndFlip, FlipAndShift, Unchanged, View
from adamerge.objectives.weighted_sum import Sum

__all__ = [
    "AffinePhotometric",
    "Composed",
    "Course",
    "CropAndFlip",
    "CrossEntropy",
    "Entropy",
    "ExpertLabels",
    "FlipAndShift",
    "HiddenAlignment",
    "LogitAlignment",
    "MarginalEntropy",
    "MixInputs",
    "NormalisedHiddenAlignment",
    "Objective",
    "PseudoLabel",
    "RandomOperations",
    "SpanCrop",
    "Sum",
    "SummedHiddenAlignment",
    "SurestOfAll",
    "SurestOfPredicted",
    "TokenDropout",
    "TokenMasking",
    "Trust",
    "Unchanged",
    "View",
    "WeightedByConfidence",
    "WhereAgreed",
]
