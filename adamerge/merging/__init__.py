"""``theta(w)`` in a network, and the gradients that come back from it.

This is the outer half of ``theta[e] = theta0[e] + sum_k phi(w[k, g(e)]) * tau_k[e]``; ``adamerge/deltas/`` is the inner one.

**A merge**, in the order in which it happens:

1. ``merged_model.py``: ``MergedModel.merge`` follows the coefficients to their device and lets the network's own parameters,
   the copy, hold a new merge.
2. ``merged_tensor.py``: ``Merge.fill`` goes through the tensors. ``updates`` asks the parametrization for its coefficients
   ``phi(w)`` and groups (``Parametrization.linear``), and ``merged_tensor`` adds base and update: the one place where that
   is written, for training, evaluation and export.
3. ``adamerge/deltas/base.py``: ``Deltas.sums`` computes the update, piece by piece.
4. ``adamerge/deltas/kernels.py``: ``SharedSums.sum`` is where numbers are multiplied and added.

**The gradient.** The network runs as ordinary training does, and ``backward()`` adds up ``G = dL/dtheta`` in the ``.grad`` of
the copy. Then, once a step:

1. ``merged_model.py``: ``MergedModel.pull_back`` gives a scalar whose backward pass asks for ``dL/dw``.
2. ``pullback.py``: ``MergeGradients``, which noted at the merge what each tensor was computed from, contracts ``G`` tensor by
   tensor, and hands ``dL/dc`` to autograd, which knows the way through ``phi`` to ``w``.
3. ``adamerge/deltas/base.py``: ``Deltas.contract`` goes through task vectors piece by piece.
4. ``adamerge/deltas/kernels.py``: ``SharedSums.contract`` is ``sum_{e in g} G[e] * tau_k[e]``.

A parametrization with another formula, such as a mask, has no ``linear``: its ``forward`` computes the update of a whole
tensor, and autograd goes back through it.

**How the copy exists**: ``copies.py`` says what a copy is and has the whole one; ``block_copy.py`` merges one block of the
network at a time; ``sharded_copy.py`` spreads it over processes. ``block_execution.py`` runs blocks checkpointed or compiled.

**What it takes**: ``footprint.py`` counts the copy's bytes, ``memory_plan.py`` adds all up before a weight is read and
chooses the storage, ``memory_report.py`` prints that; ``malloc.py`` tells the C library what to do with freed memory.
``network_checks.py`` refuses a network that is not that of base and experts.
"""
