"""Parametrizations: which elements share a coefficient, and how coefficients become an update."""

from adamerge.parametrizations.base import Parametrization, ParametrizationFactory, Update
from adamerge.parametrizations.concrete import Concrete
from adamerge.parametrizations.frozen import Frozen
from adamerge.parametrizations.importance import ImportanceChunkWise
from adamerge.parametrizations.linear import BlockWise, ChunkWise, LayerWise, Linear, TaskWise
from adamerge.parametrizations.masks import BinaryMask, ExpectedMask, HardMask, Mask, SoftMask
from adamerge.parametrizations.partition import RandomPartition

__all__ = [
    "BinaryMask",
    "BlockWise",
    "ChunkWise",
    "Concrete",
    "ExpectedMask",
    "Frozen",
    "HardMask",
    "ImportanceChunkWise",
    "LayerWise",
    "Linear",
    "Mask",
    "Parametrization",
    "ParametrizationFactory",
    "RandomPartition",
    "SoftMask",
    "TaskWise",
    "Update",
]
