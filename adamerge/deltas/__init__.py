"""What each expert changed in one tensor, ``tau_k``: summed with coefficients, and contracted with a gradient.

This is the inner half of ``theta[e] = theta0[e] + sum_k c[k, g(e)] * tau_k[e]``; ``adamerge/merging/`` is the outer one.

**The sum** of one tensor, ``sum_k c[k, g] tau_k``, in the order in which it happens:

1. ``base.py``: ``Deltas.sums(coefficients, groups)`` goes through the tensor piece by piece, and ``Deltas.summed`` through
   the experts of a piece, a few rows at a time (``row_batches``), so that no more than those are in memory.
2. ``groups.py``: ``g``, which elements of the tensor share a coefficient: all (``Whole``), contiguous runs (``Chunks``), any
   (``Ids``), none (``Elements``), or those of a row and of a column (``RowsAndColumns``); or it is not elements that have
   coefficients, but the products that factors are of (``Components``). ``Groups.within`` gives the sums of one piece.
3. ``kernels.py``: ``SharedSums.sum`` multiplies rows by their coefficients and adds them up; ``run_sums.py`` has those of
   runs, ``element_sums.py`` those of elements, rows and columns.

**Its gradient**, ``dL/dc[k, g] = sum_{e in g} G[e] * tau_k[e]`` for the gradient ``G`` of the merged tensor, has the same
stations: ``Deltas.contract`` in ``base.py``, ``Groups.within``, and ``SharedSums.contract`` in ``kernels.py``;
``span_sums.py`` adds what the pieces give to the coefficients that each of them touches. Where the sum
is part of another formula, such as a mask, ``Deltas.combine`` in ``base.py`` is both, as one function that autograd knows.

**Kinds of deltas** differ in where the rows come from: ``base.py`` has stored ones (``DenseDeltas``) and those that a
transform changes; ``streamed.py`` reads or subtracts them from files each time; ``quantized.py`` decodes them from fewer
bits; ``low_rank.py`` multiplies factors, LoRA's or those of singular components, and never makes them dense for one
coefficient of a whole tensor or of a component; ``factor_products.py`` has these products.

**Below the kernels**: ``cpu_sums.py`` says when a CPU's library may add several rows in one call without another bit;
``row_buffers.py`` has the memory that rows are made in; ``splitmix64.py`` has random numbers without a generator, for what is
drawn element by element; ``tuning.py`` has every constant with the measurement behind it.
"""
