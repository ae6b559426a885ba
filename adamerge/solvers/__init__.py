"""Solvers write new task vectors before anything is learned: closed forms and iterations, of weights alone or of inputs too.

Read ``base.py`` first: a ``TaskVectorWriter`` makes new task vectors, most of them a ``Solver``, which makes one delta of a
tensor from all experts' deltas of it; ``MatrixSolver`` is what those share that work on matrices. ``matrices.py`` has an
expert's delta as a matrix, whole or as LoRA's factors, with the products and the decomposition that formulas need. Then the
papers, one file each: ``weighted_sum.py`` (task arithmetic), ``wudi.py`` (WUDI in closed form) and ``wudi_descent.py`` (by
its own iteration), ``tsvm.py`` (task singular vectors), ``isotropic.py`` (Iso-C and Iso-CTS); ``scaled.py`` gives any of them
a strength, ``spectral_bound.py`` one that follows from the base's weights. ``sequential.py`` is the contract of a solver that
sees the inputs of linear maps, in the network's order, and ``least_squares.py`` such a one. ``components.py`` makes no one
task vector of all, but of each expert's the factors that a later stage learns coefficients for. ``solving.py`` goes through a
model tensor by tensor and writes the result, and goes on where a killed one was.
"""

from adamerge.solvers.base import MatrixSolver, Solver, TaskVectorWriter
from adamerge.solvers.components import Components
from adamerge.solvers.isotropic import IsoC, IsoCTS
from adamerge.solvers.least_squares import LeastSquares
from adamerge.solvers.scaled import Scaled
from adamerge.solvers.sequential import SequentialSolver
from adamerge.solvers.spectral_bound import SpectralBound
from adamerge.solvers.tsvm import TSVM
from adamerge.solvers.weighted_sum import WeightedSum
from adamerge.solvers.wudi import Wudi
from adamerge.solvers.wudi_descent import WudiDescent

__all__ = [
    "TSVM",
    "Components",
    "IsoC",
    "IsoCTS",
    "LeastSquares",
    "MatrixSolver",
    "Scaled",
    "SequentialSolver",
    "Solver",
    "SpectralBound",
    "TaskVectorWriter",
    "WeightedSum",
    "Wudi",
    "WudiDescent",
]
