"""Parametrizations: which elements share a coefficient, and how coefficients become an update."""

from adamerge.parametrizations.base import Parametrization, ParametrizationFactory
from adamerge.parametrizations.importance import ImportanceChunkWise
from adamerge.parametrizations.linear import BlockWise, ChunkWise, LayerWise, Linear, TaskWise
from adamerge.parametrizations.partition import RandomPartition

__all__ = [
    "BlockWise",
    "ChunkWise",
    "ImportanceChunkWise",
    "LayerWise",
    "Linear",
    "Parametrization",
    "ParametrizationFactory",
    "RandomPartition",
    "TaskWise",
]
