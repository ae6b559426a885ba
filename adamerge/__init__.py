"""adamerge: learn how to merge models."""

# Longer than 250 lines: a public name stands twice, for who runs it and for who checks its type.

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

HOMES = {  # public name to the module that holds it; files name parts by these names alone
    "AffinePhotometric": "objectives",
    "Automatic": "task_vectors.automatic_storage",
    "Backbone": "backbones",
    "Bilevel": "training",
    "BinaryMask": "parametrizations",
    "BlockCopy": "merging.block_copy",
    "BlockWise": "parametrizations",
    "Calibration": "data",
    "CausalLM": "backbones",
    "ChunkWise": "parametrizations",
    "Clamp": "parametrizations.constraints",
    "ClipVisionClassifier": "backbones",
    "CoefficientNorm": "objectives.penalties",
    "Coefficients": "artifacts.coefficients",
    "CollapseGuard": "training.collapse_guard",
    "Combine": "transforms",
    "ComponentWise": "parametrizations",
    "Components": "solvers",
    "Composed": "objectives",
    "Concrete": "parametrizations",
    "Constraint": "parametrizations.constraints",
    "Copy": "merging.copies",
    "CosineDecay": "training",
    "CosineRestarts": "training",
    "CropAndFlip": "objectives",
    "CrossEntropy": "objectives",
    "Dare": "transforms",
    "Descent": "training",
    "DisjointMean": "transforms",
    "Disk": "task_vectors.storage",
    "DistanceToInitial": "objectives.penalties",
    "ElementWise": "parametrizations",
    "Elementwise": "transforms",
    "Entropy": "objectives",
    "EqualAtStart": "training",
    "ExpectedMask": "parametrizations",
    "ExpertLabels": "objectives",
    "FlipAndShift": "objectives",
    "Free": "parametrizations.constraints",
    "Frozen": "parametrizations",
    "HardMask": "parametrizations",
    "HiddenAlignment": "objectives",
    "HighestAgreement": "training.selection",
    "HighestScore": "training.selection",
    "ImageCalibration": "data",
    "ImageClassifier": "backbones",
    "ImageTask": "data",
    "ImageTextCalibration": "data",
    "ImageTextTask": "data",
    "ImportanceChunkWise": "parametrizations",
    "IsoC": "solvers",
    "IsoCTS": "solvers",
    "KeepBest": "training.keep_best",
    "LanguageCalibration": "data",
    "LanguageTask": "data",
    "LayerWise": "parametrizations",
    "LeastSquares": "solvers",
    "LogitAlignment": "objectives",
    "LowBit": "task_vectors.storage",
    "LowestTarget": "training.selection",
    "Magnitude": "transforms",
    "MarginalEntropy": "objectives",
    "Mask": "parametrizations",
    "MatrixSolver": "solvers",
    "MergedModel": "merging.merged_model",
    "Merging": "training",
    "MergingModule": "training",
    "MixInputs": "objectives",
    "NoData": "data",
    "NormalisedHiddenAlignment": "objectives",
    "Objective": "objectives",
    "OpenClipClassifier": "backbones",
    "Parametrization": "parametrizations",
    "Passes": "merging.block_execution",
    "Penalty": "objectives.penalties",
    "Pinned": "task_vectors.storage",
    "Projection": "parametrizations.constraints",
    "PseudoLabel": "objectives",
    "RandomOperations": "objectives",
    "RandomPartition": "parametrizations",
    "RankMask": "parametrizations",
    "Resident": "task_vectors.storage",
    "RootSumSquare": "transforms",
    "RowColumnWise": "parametrizations",
    "RunawayGuard": "training.callbacks",
    "Scale": "transforms",
    "Schedule": "training",
    "Scaled": "solvers",
    "Scorer": "training.scorer",
    "Search": "training",
    "Selection": "training.selection",
    "SentenceClassifier": "backbones",
    "Seq2Seq": "backbones",
    "SequenceClassifier": "backbones",
    "SequentialSolver": "solvers",
    "ShardedCopy": "merging.sharded_copy",
    "Sigmoid": "parametrizations.constraints",
    "SoftMask": "parametrizations",
    "Softmax": "parametrizations.constraints",
    "Solver": "solvers",
    "SpanCrop": "objectives",
    "StartAlone": "parametrizations",
    "Storage": "task_vectors.storage",
    "Sum": "objectives",
    "SummedDistanceToInitial": "objectives.penalties",
    "SummedHiddenAlignment": "objectives",
    "SurestOfAll": "objectives",
    "SurestOfPredicted": "objectives",
    "TaskVectorWriter": "solvers",
    "TaskVectors": "task_vectors.task_vectors",
    "TaskWise": "parametrizations",
    "TeacherCache": "training",
    "TeacherFiles": "training",
    "Teachers": "training",
    "TeachersAhead": "training",
    "TestbedImages": "testbed.data",
    "TestbedLanguage": "testbed.data",
    "TestbedText": "testbed.data",
    "TextCalibration": "data",
    "TextTask": "data",
    "Ties": "transforms",
    "TokenDropout": "objectives",
    "TokenMasking": "objectives",
    "Transform": "transforms",
    "Trust": "objectives",
    "TSVM": "solvers",
    "Unchanged": "objectives",
    "View": "objectives",
    "VisionLanguage": "backbones",
    "WeightedSum": "solvers",
    "WeightedByConfidence": "objectives",
    "WhereAgreed": "objectives",
    "WholeCopy": "merging.copies",
    "Wudi": "solvers",
    "WudiDescent": "solvers",
    "draw_heatmap": "artifacts.heatmap",
    "export": "artifacts.export",
    "load_coefficients": "artifacts.coefficients",
    "save_coefficients": "artifacts.coefficients",
}

DATA_MODULES = {  # plain classes where they are held; here as data modules, which Lightning's trainer takes
    "Calibration",
    "ImageCalibration",
    "ImageTextCalibration",
    "LanguageCalibration",
    "NoData",
    "TestbedImages",
    "TestbedLanguage",
    "TestbedText",
    "TextCalibration",
}

__all__ = ["__version__", *HOMES]

if TYPE_CHECKING:
    from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
    from adamerge.artifacts.export import export
    from adamerge.artifacts.heatmap import draw_heatmap
    from adamerge.backbones import (
        Backbone,
        CausalLM,
        ClipVisionClassifier,
        ImageClassifier,
        OpenClipClassifier,
        SentenceClassifier,
        Seq2Seq,
        SequenceClassifier,
        VisionLanguage,
    )
    from adamerge.data import (
        Calibration,
        ImageCalibration,
        ImageTask,
        ImageTextCalibration,
        ImageTextTask,
        LanguageCalibration,
        LanguageTask,
        NoData,
        TextCalibration,
        TextTask,
    )
    from adamerge.merging.block_copy import BlockCopy
    from adamerge.merging.block_execution import Passes
    from adamerge.merging.copies import Copy, WholeCopy
    from adamerge.merging.merged_model import MergedModel
    from adamerge.merging.sharded_copy import ShardedCopy
    from adamerge.objectives import (
        AffinePhotometric,
        Composed,
        CropAndFlip,
        CrossEntropy,
        Entropy,
        ExpertLabels,
        FlipAndShift,
        HiddenAlignment,
        LogitAlignment,
        MarginalEntropy,
        MixInputs,
        NormalisedHiddenAlignment,
        Objective,
        PseudoLabel,
        RandomOperations,
        SpanCrop,
        Sum,
        SummedHiddenAlignment,
        SurestOfAll,
        SurestOfPredicted,
        TokenDropout,
        TokenMasking,
        Trust,
        Unchanged,
        View,
        WeightedByConfidence,
        WhereAgreed,
    )
    from adamerge.objectives.penalties import CoefficientNorm, DistanceToInitial, Penalty, SummedDistanceToInitial
    from adamerge.parametrizations import (
        BinaryMask,
        BlockWise,
        ChunkWise,
        ComponentWise,
        Concrete,
        ElementWise,
        ExpectedMask,
        Frozen,
        HardMask,
        ImportanceChunkWise,
        LayerWise,
        Mask,
        Parametrization,
        RandomPartition,
        RankMask,
        RowColumnWise,
        SoftMask,
        StartAlone,
        TaskWise,
    )
    from adamerge.parametrizations.constraints import Clamp, Constraint, Free, Projection, Sigmoid, Softmax
    from adamerge.solvers import (
        TSVM,
        Components,
        IsoC,
        IsoCTS,
        LeastSquares,
        MatrixSolver,
        Scaled,
        SequentialSolver,
        Solver,
        TaskVectorWriter,
        WeightedSum,
        Wudi,
        WudiDescent,
    )
    from adamerge.task_vectors.automatic_storage import Automatic
    from adamerge.task_vectors.storage import Disk, LowBit, Pinned, Resident, Storage
    from adamerge.task_vectors.task_vectors import TaskVectors
    from adamerge.testbed.data import TestbedImages, TestbedLanguage, TestbedText
    from adamerge.training import (
        Bilevel,
        CosineDecay,
        CosineRestarts,
        Descent,
        EqualAtStart,
        Merging,
        MergingModule,
        Schedule,
        Search,
        TeacherCache,
        TeacherFiles,
        Teachers,
        TeachersAhead,
    )
    from adamerge.training.callbacks import RunawayGuard
    from adamerge.training.collapse_guard import CollapseGuard
    from adamerge.training.keep_best import KeepBest
    from adamerge.training.scorer import Scorer
    from adamerge.training.selection import HighestAgreement, HighestScore, LowestTarget, Selection
    from adamerge.transforms import (
        Combine,
        Dare,
        DisjointMean,
        Elementwise,
        Magnitude,
        RootSumSquare,
        Scale,
        Ties,
        Transform,
    )


def __getattr__(name: str) -> Any:
    # lazily, so that `adamerge --help` imports no torch, and `export` no Lightning
    if name not in HOMES:
        raise AttributeError(f"module 'adamerge' has no attribute '{name}'")
    part = getattr(importlib.import_module(f"adamerge.{HOMES[name]}"), name)
    return importlib.import_module("adamerge.training.data_modules").of(part) if name in DATA_MODULES else part
