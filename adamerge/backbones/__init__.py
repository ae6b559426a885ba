"""Backbones: networks that hold a merged copy, one file a library or family."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adamerge.backbones.base import IGNORED, Backbone, Batch, Encoded, Output, Task, Teacher, masked_mean
from adamerge.backbones.inputs import Inputs

_HOMES = {
    "CausalLM": "language",
    "ClipVisionClassifier": "vision",
    "ImageClassifier": "vision",
    "OpenClipClassifier": "open_clip",
    "SentenceClassifier": "encoder",
    "Seq2Seq": "language",
    "SequenceClassifier": "encoder",
    "VisionLanguage": "language",
}

__all__ = [
    "IGNORED",
    "Backbone",
    "Batch",
    "Encoded",
    "Inputs",
    "Output",
    "Task",
    "Teacher",
    "masked_mean",
    *_HOMES,
]

if TYPE_CHECKING:
    from adamerge.backbones.encoder import SentenceClassifier, SequenceClassifier
    from adamerge.backbones.language import CausalLM, Seq2Seq, VisionLanguage
    from adamerge.backbones.open_clip import OpenClipClassifier
    from adamerge.backbones.vision import ClipVisionClassifier, ImageClassifier


def __getattr__(name: str) -> Any:
    # lazily, so that a run of one library's networks does not load the other library
    if name not in _HOMES:
        raise AttributeError(f"module 'adamerge.backbones' has no attribute '{name}'")
    return getattr(importlib.import_module(f"adamerge.backbones.{_HOMES[name]}"), name)
