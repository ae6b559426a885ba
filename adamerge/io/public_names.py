"""Public names: what files call a part, whatever module holds it, and the former names that are still understood."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import adamerge

PREFIX = "adamerge."

_VERSION_0_1 = {
    "automatic": "Automatic",
    "backbones": (
        "Backbone CausalLM ClipVisionClassifier ImageClassifier OpenClipClassifier SentenceClassifier Seq2Seq "
        "SequenceClassifier VisionLanguage"
    ),
    "backbones.base": "Backbone",
    "backbones.causal": "CausalLM",
    "backbones.encoder": "SentenceClassifier SequenceClassifier",
    "backbones.open_clip": "OpenClipClassifier",
    "backbones.seq2seq": "Seq2Seq",
    "backbones.vision": "ClipVisionClassifier ImageClassifier",
    "backbones.vision_language": "VisionLanguage",
    "blocks": "BlockCopy",
    "callbacks": "CollapseGuard RunawayGuard",
    "coefficients": "Coefficients",
    "constraints": "Clamp Constraint Free Projection Sigmoid Softmax",
    "copies": "Copy WholeCopy",
    "data": (
        "Calibration ImageCalibration ImageTask ImageTextCalibration ImageTextTask LanguageCalibration "
        "LanguageTask TextCalibration TextTask"
    ),
    "data.base": "Calibration",
    "data.image_text": "ImageTextCalibration ImageTextTask",
    "data.images": "ImageCalibration ImageTask",
    "data.language": "LanguageCalibration LanguageTask",
    "data.text": "TextCalibration TextTask",
    "merged_model": "MergedModel",
    "modules": "AdaptiveMerging BilevelMerging MergingModule TeacherCache TeacherFiles",
    "modules.adaptive": "AdaptiveMerging",
    "modules.base": "MergingModule",
    "modules.bilevel": "BilevelMerging",
    "modules.teachers": "TeacherCache TeacherFiles",
    "objectives": (
        "CrossEntropy Entropy FlipAndShift HiddenAlignment LogitAlignment Objective PseudoLabel RandomOperations "
        "Sum Unchanged View"
    ),
    "objectives.alignment": "HiddenAlignment LogitAlignment",
    "objectives.base": "Objective",
    "objectives.cross_entropy": "CrossEntropy",
    "objectives.entropy": "Entropy",
    "objectives.pseudo_label": "PseudoLabel",
    "objectives.sums": "Sum",
    "objectives.views": "FlipAndShift RandomOperations Unchanged View",
    "parametrizations": (
        "BinaryMask BlockWise ChunkWise Concrete ExpectedMask Frozen HardMask ImportanceChunkWise LayerWise Mask "
        "Parametrization RandomPartition SoftMask TaskWise"
    ),
    "parametrizations.base": "Parametrization",
    "parametrizations.concrete": "Concrete",
    "parametrizations.frozen": "Frozen",
    "parametrizations.importance": "ImportanceChunkWise",
    "parametrizations.linear": "BlockWise ChunkWise LayerWise TaskWise",
    "parametrizations.masks": "BinaryMask ExpectedMask HardMask Mask SoftMask",
    "parametrizations.partition": "RandomPartition",
    "passes": "Passes",
    "penalties": "CoefficientNorm DistanceToInitial Penalty SummedDistanceToInitial",
    "selection": "HighestScore KeepBest LowestTarget Selection",
    "shards": "ShardedCopy",
    "storage": "Disk LowBit Pinned Resident Storage",
    "task_vectors": "TaskVectors",
    "testbed.data": "TestbedImages TestbedLanguage TestbedText",
    "transforms": "Combine Elementwise Magnitude Scale Ties Transform",
    "transforms.arithmetic": "Combine Scale",
    "transforms.base": "Elementwise Transform",
    "transforms.magnitude": "Magnitude",
    "transforms.ties": "Ties",
}
"""Module of version 0.1 to the parts that files could name there."""

_VERSION_0_2 = {"AdaptiveMerging": "Descent", "BilevelMerging": "Bilevel"}
"""Public name until version 0.2, when a search was the module itself, to today's."""

FORMER = {
    **{
        f"{PREFIX}{module}.{name}": f"{PREFIX}{_VERSION_0_2.get(name, name)}"
        for module, names in _VERSION_0_1.items()
        for name in names.split()
    },
    **{former: f"{PREFIX}{name}" for own, name in _VERSION_0_2.items() for former in (own, f"{PREFIX}{own}")},
}
"""Former name to today's full one."""


def public_name(part: Any) -> str:
    """Returns what files call a class or function: ``adamerge.Projection``, or the full name of one from elsewhere."""
    name = PREFIX + part.__qualname__
    if part.__module__.startswith(PREFIX) and is_public(name):
        return name
    return f"{part.__module__}.{part.__qualname__}"


def current_name(name: str) -> str:
    """Returns today's full name of what had this one; a name that never changed is returned as it is."""
    return FORMER.get(name, name)


def renewed(content: Any) -> Any:
    """Returns what a YAML or JSON file holds, with today's names wherever a text is a former one."""
    if isinstance(content, dict):
        return {key: renewed(value) for key, value in content.items()}
    if isinstance(content, list):
        return [renewed(value) for value in content]
    return current_name(content) if isinstance(content, str) else content


def private_names(content: Any) -> Iterator[str]:
    """Yields what a configuration names as a class of ``adamerge`` and is no public name, wherever it stands."""
    if isinstance(content, dict):
        name = content.get("class_path")
        if isinstance(name, str) and name.startswith(PREFIX) and not is_public(name):
            yield name
    for value in (
        content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    ):
        yield from private_names(value)


def is_public(name: str) -> bool:
    """Returns whether ``adamerge`` offers something under this full name, as ``adamerge.Projection``."""
    return name.startswith(PREFIX) and name.removeprefix(PREFIX) in adamerge.__all__


def find(name: str) -> Any:
    """Returns what a full name stands for, today's or a former one; of ``adamerge`` its public names alone are imported.

    Of data it is the plain class, of which ``adamerge`` offers a data module that brings Lightning with it.

    Raises:
        LookupError: there is nothing of that name, or its module cannot be imported.
    """
    current = current_name(name)
    if current.startswith(PREFIX):
        if not is_public(current):
            raise LookupError(f"adamerge {adamerge.__version__} has no part of this name")
        module, _, last = held_name(current).rpartition(".")
        return getattr(importlib.import_module(module), last)
    module, _, last = current.rpartition(".")
    try:
        holder = importlib.import_module(module)
    except Exception as error:  # whatever a module does when it is imported
        raise LookupError(str(error)) from error
    if not hasattr(holder, last):
        raise LookupError(f"module '{module}' has no attribute '{last}'")
    return getattr(holder, last)


def held_name(name: str) -> str:
    """Returns the full name, by the module that holds it, of what ``adamerge`` offers under this public name."""
    last = name.removeprefix(PREFIX)
    return f"{PREFIX}{adamerge.HOMES[last]}.{last}"
