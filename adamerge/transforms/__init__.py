"""Transforms: task vectors to task vectors, before merging; one file an idea."""

from adamerge.transforms.arithmetic import Combine, Scale
from adamerge.transforms.base import Elementwise, State, Transform
from adamerge.transforms.dare import Dare
from adamerge.transforms.magnitude import Magnitude
from adamerge.transforms.ties import DisjointMean, Ties

__all__ = ["Combine", "Dare", "DisjointMean", "Elementwise", "Magnitude", "Scale", "State", "Ties", "Transform"]
