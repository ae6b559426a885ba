"""Backbones: networks that hold a merged copy, one file a library or family."""

from adamerge.backbones.base import IGNORED, Backbone, Batch, Encoded, Output, Task, Teacher, masked_mean
from adamerge.backbones.causal import CausalLM
from adamerge.backbones.inputs import Inputs
from adamerge.backbones.open_clip import OpenClipClassifier

__all__ = [
    "IGNORED",
    "Backbone",
    "Batch",
    "CausalLM",
    "Encoded",
    "Inputs",
    "OpenClipClassifier",
    "Output",
    "Task",
    "Teacher",
    "masked_mean",
]
