"""Files that are not trusted, opened; files that must be whole, written. No model and no formula is known here.

Read ``safetensors_file.py`` first: a file of tensors, of which headers are checked before anything is made of them. Beside
it ``untrusted_files.py`` opens regular files alone and reads JSON, ``pickles.py`` and ``untrusted_settings.py`` refuse what
would run code, ``links.py`` what leads out of a folder, and ``hub_ids.py`` tells ids on the Hub from paths. Then writing:
``atomic.py`` (a file or folder appears whole or not at all), ``safetensors_writer.py`` (weights behind headers that are known
before), ``resumable_file.py`` (the same over several sessions). ``coefficient_file.py`` and ``task_vector_file.py`` are the
project's own formats in bytes; ``public_names.py`` and ``versions.py`` let a file
outlive the version that wrote it; ``model_folder.py`` says how an exported folder looks, and ``run_folder.py`` how a run's
does, which can be moved. ``unwritten.py`` has the marks that
stand for files of an earlier stage. ``dtypes.py`` and ``tensor_bytes.py`` are what all of these need of torch.
"""
