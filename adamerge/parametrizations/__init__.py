"""Parametrizations: which elements share a coefficient, and how coefficients become an update.

Read ``base.py`` first, then ``linear.py``: most are of the linear family, which differ in ``g`` alone, and ``constraints.py``
is their ``phi``. ``importance.py`` and ``partition.py`` are further members, ``per_tensor.py`` has those with coefficients by
the million, ``component_wise.py`` those of singular components, ``start_alone.py`` one without any. ``wrapper.py`` is for
what goes around another one: ``frozen.py``, ``rank_mask.py``, which chooses components, and ``concrete.py`` with its
``masks.py``. ``hashed_noise.py`` has random numbers without a generator; ``held_names.py`` says by name which coefficients
were held at their initial values.
"""

from adamerge.parametrizations.base import Parametrization, ParametrizationFactory, Update
from adamerge.parametrizations.component_wise import ComponentWise
from adamerge.parametrizations.concrete import Concrete
from adamerge.parametrizations.frozen import Frozen
from adamerge.parametrizations.importance import ImportanceChunkWise
from adamerge.parametrizations.linear import BlockWise, ChunkWise, LayerWise, Linear, TaskWise
from adamerge.parametrizations.masks import BinaryMask, ExpectedMask, HardMask, Mask, SoftMask
from adamerge.parametrizations.partition import RandomPartition
from adamerge.parametrizations.per_tensor import ElementWise, RowColumnWise
from adamerge.parametrizations.rank_mask import RankMask
from adamerge.parametrizations.start_alone import StartAlone

__all__ = [
    "BinaryMask",
    "BlockWise",
    "ChunkWise",
    "ComponentWise",
    "Concrete",
    "ElementWise",
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
    "RankMask",
    "RowColumnWise",
    "SoftMask",
    "StartAlone",
    "TaskWise",
    "Update",
]
