"""Backbones: the networks whose parameters hold the merged copy."""

from adamerge.backbones.base import Backbone, Batch, Output, Task
from adamerge.backbones.open_clip import OpenClipClassifier

__all__ = ["Backbone", "Batch", "OpenClipClassifier", "Output", "Task"]
