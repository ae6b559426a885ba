"""Transforms: task vectors to task vectors, before merging; one file an idea."""

from adamerge.transforms.base import State, Transform
from adamerge.transforms.ties import Ties

__all__ = ["State", "Ties", "Transform"]
