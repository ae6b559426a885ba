"""Base, named experts and transforms together: ``tau_k = theta_k - theta_0`` of every tensor, and where these are kept.

Read ``task_vectors.py`` first: ``TaskVectors`` maps a tensor's name to its deltas (``adamerge/deltas/``), transformed at each
read; ``raw_deltas.py`` has them before that, ``component_file.py`` those that a file holds as factors, and ``start.py`` opens
one more vector, of coefficient 1. ``storage.py`` then says where deltas are between merges, and in how many bits: on the
device, in pinned memory, in 8 or 4 bits, or on disk; ``automatic_storage.py`` takes the fastest exact one that fits.
``memory.py`` tells what they would take from headers alone, and what this machine has left; ``pinned_transfer.py`` brings
pinned deltas to a device while it computes.
"""
