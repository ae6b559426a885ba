"""From a path, a Hub id or an adapter to one model's tensors by name, one tensor at a time.

Read ``checkpoint.py`` first: ``Checkpoint`` is a mapping from on-disk names to tensors, with shapes and dtypes from headers,
and a fingerprint of all weights. ``opening.py`` makes one of whatever a user wrote. Kinds: ``lora.py`` (an adapter beside its
base, with ``lora_config.py`` and ``lora_factors.py``), ``task_vectors.py`` (deltas as a solver wrote them),
``renamed_checkpoint.py`` (names with another prefix, found by ``prefix_matching.py``), ``hub_headers.py`` (headers alone,
before a download). Then what is asked of several models: ``compatibility.py`` (has an expert the base's tensors),
``obsolete_tensors.py``, ``config_differences.py``; ``name_patterns.py`` has globs and blocks of names, ``origins.py`` what
others know a model by.
"""
