"""Tuning constants of sums, hashes and transfers, together with the measurement that each comes from.

None of them changes a result: an element's sum has the same bits wherever a tensor is cut, and sums of products are as
exact as the tests of ``tests/deltas`` bound them. Measured with ``tests/benchmarks/step.py`` (ViT-B/32 and eight experts,
on two cores) unless another measurement is named.
"""

from __future__ import annotations

PIECE = 1 << 19
"""Elements that sums go through at a time where experts' rows are made first (read and subtracted, or decoded): the made
rows of a few experts stay in a processor's cache. Larger pieces took longer."""

STORED_PIECE = 1 << 22
"""The same where rows are added from where they are stored, and the sum alone is in that cache: together with ``RUN``,
twice the length that was tried before takes a fifteenth less for a merge and a contraction."""

EXPORTED_PIECE = 1 << 17
"""Elements that an export merges at a time: of larger pieces the C library keeps more and more memory that it does not use
again, and of 2**15 the calls count (``tests/benchmarks/export.py``)."""

FEW = 4
"""Experts whose rows are made at once on a CPU, and added up in one call where its linear algebra library can: less time
than one by one, to the same bits."""

RUN = 1 << 14
"""Elements whose products with several rows the linear algebra library sums at a time; their sums are added in float64.
Relative errors stay below 5e-7 over 2**21 elements (``tests/deltas/test_kernels.py``)."""

LONG_RUN = 1 << 16
"""The same for one row, of which the library keeps more running sums: on one thread, twice as long was off by 6e-7."""

VECTOR = 16
"""Bytes of the vectors in which the library sums the products of one row."""

SEGMENT = 1 << 12
"""Elements, at least, whose products are summed in one run where they are summed one after the other (random parts)."""

LONGEST_INDEXED = 1 << 10
"""Elements of runs of unequal lengths from which each is summed by calls of its own; of shorter ones the calls take longer
than an index for each element."""

TILE = 1 << 16
"""Elements of a matrix whose products with coefficients of rows and columns are made at a time: they stay in a processor's
cache until they are added up."""

TERMS = 1 << 7
"""Components of a product of factors whose slopes are made at a time, at least."""

BAG = 1 << 12
"""Elements, at most, that are added up at a time where all experts' rows are: their sums stay in a processor's registers.
A merge of eight experts takes an eighth less than row by row, of twenty a quarter."""

FEWEST = 1 << 8
"""Elements, at least, for which adding up all rows at a time takes less than adding row by row."""

HASHED_NOISE = 1 << 22
"""Elements of noise hashed at a time, so that the integers take little memory beside a tensor of the model."""

HASHED_IDS = 1 << 20
"""Elements of a random partition hashed at a time, for the same reason."""

PINNED_PIECE = 1 << 28
"""Bytes of a piece of pinned memory: the allocator rounds each up to a power of two, so many small ones would waste half."""
