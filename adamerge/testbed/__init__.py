"""The testbed: small models, their experts and tasks, made from installed packages alone; for tests and the demo.

Read ``demo.py`` first, which merges the image experts, compares and exports. Three beds are made the same way. Images:
``image_sources.py``, ``image_shifts.py`` and ``image_tasks.py`` are the data, ``make_images.py`` trains a small CLIP and its
experts. Texts: ``text_files.py``, ``text_python.py``, ``text_sources.py``, ``text_tasks.py``, then ``make_text.py``. Language
models: ``causal_sources.py``, ``causal_tasks.py``, then ``make_causal.py``. ``making.py`` is what the three scripts share,
``cache.py`` keeps the splits, and ``data.py`` has the data modules.
"""
