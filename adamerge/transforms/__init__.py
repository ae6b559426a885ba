"""Transforms: they change task vectors before these are merged, one idea per file.

Read ``base.py`` first: the contract, one tensor's deltas at a time, after one look at all of them. ``arithmetic.py`` scales
and adds whole task vectors, ``magnitude.py`` keeps the largest entries of each matrix, ``dare.py`` drops entries at random,
``ties.py`` trims, elects signs and keeps what agrees with them, and ``root_sum_square.py`` makes one task vector of all.
"""

from adamerge.transforms.arithmetic import Combine, Scale
from adamerge.transforms.base import Elementwise, State, Transform, check_states
from adamerge.transforms.dare import Dare
from adamerge.transforms.magnitude import Magnitude
from adamerge.transforms.root_sum_square import RootSumSquare
from adamerge.transforms.ties import DisjointMean, Ties

__all__ = [
    "Combine",
    "Dare",
    "DisjointMean",
    "Elementwise",
    "Magnitude",
    "RootSumSquare",
    "Scale",
    "State",
    "Ties",
    "Transform",
    "check_states",
]
