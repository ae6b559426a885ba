"""Backbones: networks that hold a merged copy, one file per library or family.

Read ``base.py`` first: the contract, from a sample to logits. ``inputs.py`` says how samples become inputs, ``batch.py``
what comes with them, ``lengths.py`` how much of them is padding, and ``output.py`` what network and head make of them.
``open_clip.py`` is one library; ``transformers.py`` is what all networks of the other share: ``vision.py``, ``encoder.py``,
``causal.py`` with ``chat_templates.py``, ``seq2seq.py`` and ``vision_language.py``. What stands behind the trunk is in
``zero_shot_head.py``, ``expert_heads.py`` or ``language_head.py``. Shared parts: ``name_map.py`` (on-disk names),
``structure.py`` (blocks of a network), ``hidden_states.py`` (states by number), ``losses.py`` (losses of tokens),
``linears.py`` (where a network multiplies by its matrices, in their order) and ``capture.py`` (what enters there).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adamerge.backbones.base import Backbone
from adamerge.backbones.batch import IGNORED, Batch, Teacher
from adamerge.backbones.inputs import Inputs
from adamerge.backbones.output import Encoded, Output, masked_mean
from adamerge.backbones.zero_shot_head import Task

_HOMES = {
    "CausalLM": "causal",
    "ClipVisionClassifier": "vision",
    "ImageClassifier": "vision",
    "OpenClipClassifier": "open_clip",
    "SentenceClassifier": "encoder",
    "Seq2Seq": "seq2seq",
    "SequenceClassifier": "encoder",
    "VisionLanguage": "vision_language",
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
    from adamerge.backbones.causal import CausalLM
    from adamerge.backbones.encoder import SentenceClassifier, SequenceClassifier
    from adamerge.backbones.open_clip import OpenClipClassifier
    from adamerge.backbones.seq2seq import Seq2Seq
    from adamerge.backbones.vision import ClipVisionClassifier, ImageClassifier
    from adamerge.backbones.vision_language import VisionLanguage


def __getattr__(name: str) -> Any:
    # lazily: each loads a library of networks, and a run needs one of them
    if name not in _HOMES:
        raise AttributeError(f"module 'adamerge.backbones' has no attribute '{name}'")
    return getattr(importlib.import_module(f"adamerge.backbones.{_HOMES[name]}"), name)
