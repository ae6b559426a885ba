"""The verbs, and what a run leaves on disk.

Each verb has a file: ``fit``, ``check``, ``compare``, ``scoring`` (``adamerge test``) and ``inspection``; ``verbs`` holds the
command lines of those that take a pool and a method.

**A comparison**, in the order in which it happens: ``comparison_rows`` crosses methods with a grid, ``comparison_fits`` with
seeds, and fits them; ``finished_runs`` reads what a run says of itself; ``comparison_scores`` scores all, and ``kept_scores``
keeps it; ``comparison_result`` has the statistics, ``comparison_table`` the text, which ``table_files`` and
``comparison_figure`` write.

**From words to a fit**, in the order in which it happens:

1. ``command_line`` tells files, overrides and flags apart; ``config_files`` reads the files, ``former_keys`` gives what has a
   former name today's, and ``overrides`` lays files and words over each other.
2. ``configuration`` is the result as plain data, one for each stage of a method: ``--2.model.search.lr=0.1`` is told here.
3. ``parser`` types it, for every verb alike, and loads no trainer; ``trainer_keys`` has the trainer's arguments for it, and
   ``seeds`` gives all that is drawn one number. What it refuses is told in one line by ``parser_faults``, ``signatures`` and
   ``class_names``.
4. ``early_checks`` makes what opens no file and asks all that is known by then, with ``trainer_settings``. Here ``check``
   goes on to headers (``pool``).
5. ``instantiate`` makes module, data and trainer; ``preparation`` asks the rest before anything is written.

**A run**: ``run_folders`` names and locks its folder, ``run_config``, ``environment`` and ``summary`` are its files,
``solve`` is a method that writes task vectors instead of learning, and ``stages`` runs a method of several. ``help`` and
``class_descriptions`` read the sources and import nothing.
"""
