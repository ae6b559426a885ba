"""What a merge leaves behind: coefficients with their recipe, the exported folder with its card, and pictures.

Read ``coefficients.py`` first: ``Coefficients`` are all that an export needs besides the models' own files, saved and loaded
with ``recipe.py``, which turns parts into plain data and back, and ``model_sources.py``, which says where base and experts
are and whether they are still the same. ``export.py`` writes the merged model, one tensor at a time,
into a folder that ``export_files.py`` stages and completes; ``lora_export.py`` writes merged LoRA experts as one adapter;
``model_card.py`` is the folder's README. ``importance.py`` makes the allocation of a second stage from the coefficients of a
first. ``coefficient_table.py`` decides what people see of them, and ``heatmap.py`` draws it, in the cells that
``heatmap_cells.py`` arranges and the colours of ``colour_scale.py``.
"""
