"""Parametrizations: which elements share a coefficient, and how coefficients become an update."""

from adamerge.parametrizations.base import Parametrization, ParametrizationFactory
from adamerge.parametrizations.linear import BlockWise, ChunkWise, LayerWise, Linear, TaskWise

__all__ = [
    "BlockWise",
    "ChunkWise",
    "LayerWise",
    "Linear",
    "Parametrization",
    "ParametrizationFactory",
    "TaskWise",
]
