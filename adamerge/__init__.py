"""adamerge: learn how to merge models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveMerging": "modules",
    "Backbone": "backbones",
    "BlockWise": "parametrizations",
    "Calibration": "data",
    "ChunkWise": "parametrizations",
    "Clamp": "constraints",
    "Coefficients": "coefficients",
    "Combine": "transforms",
    "Constraint": "constraints",
    "DistanceToInitial": "penalties",
    "Elementwise": "transforms",
    "Entropy": "objectives",
    "Free": "constraints",
    "ImageCalibration": "data",
    "ImageTask": "data",
    "ImportanceChunkWise": "parametrizations",
    "LayerWise": "parametrizations",
    "Magnitude": "transforms",
    "MergedModel": "merged_model",
    "Objective": "objectives",
    "OpenClipClassifier": "backbones",
    "Parametrization": "parametrizations",
    "Penalty": "penalties",
    "Projection": "constraints",
    "RandomPartition": "parametrizations",
    "Scale": "transforms",
    "Sigmoid": "constraints",
    "Softmax": "constraints",
    "TaskVectors": "task_vectors",
    "TaskWise": "parametrizations",
    "Ties": "transforms",
    "Transform": "transforms",
    "load_coefficients": "coefficients",
    "save_coefficients": "coefficients",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from adamerge.backbones import Backbone, OpenClipClassifier
    from adamerge.coefficients import Coefficients, load_coefficients, save_coefficients
    from adamerge.constraints import Clamp, Constraint, Free, Projection, Sigmoid, Softmax
    from adamerge.data import Calibration, ImageCalibration, ImageTask
    from adamerge.merged_model import MergedModel
    from adamerge.modules import AdaptiveMerging
    from adamerge.objectives import Entropy, Objective
    from adamerge.parametrizations import (
        BlockWise,
        ChunkWise,
        ImportanceChunkWise,
        LayerWise,
        Parametrization,
        RandomPartition,
        TaskWise,
    )
    from adamerge.penalties import DistanceToInitial, Penalty
    from adamerge.task_vectors import TaskVectors
    from adamerge.transforms import Combine, Elementwise, Magnitude, Scale, Ties, Transform


def __getattr__(name: str) -> Any:
    # lazily, so that `adamerge --help` imports no torch, and `export` no Lightning
    if name not in _HOMES:
        raise AttributeError(f"module 'adamerge' has no attribute '{name}'")
    return getattr(importlib.import_module(f"adamerge.{_HOMES[name]}"), name)
