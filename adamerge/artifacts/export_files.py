"""What an exported folder is made of: staged, with tensors of which model, files beside them, and the experts' heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adamerge.artifacts.coefficients import Coefficients, save_coefficients
from adamerge.artifacts.model_card import COEFFICIENTS_FILE, card
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.lora import AdapterCheckpoint
from adamerge.checkpoints.origins import is_path, origin
from adamerge.checkpoints.task_vectors import TaskVectorCheckpoint
from adamerge.errors import CoefficientsError, ConfigError, ExportError
from adamerge.io.atomic import staged_folder
from adamerge.io.dtypes import name_of
from adamerge.io.links import refuse_outside
from adamerge.io.model_folder import Layout
from adamerge.io.safetensors_writer import verify_tensors, write_tensors
from adamerge.io.untrusted_files import quoted, read_json

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
PLACES = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"}
"""Keys under which libraries write where a configuration was read from; nothing is loaded from there."""


@contextmanager
def staged_export(coefficients: Coefficients, target: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` to write a merged model into; on success it takes the place of ``target``.

    The models are read and checked before and after; coefficients and card are added to what was written.

    Args:
        coefficients: of what is exported.
        target: the new folder.
        overwrite: replace an existing folder, which stays until the new one is complete.

    Raises:
        ExportError: the target exists, or cannot be written.
        CheckpointError: a model's weights cannot be read, are not finite, or changed since they were opened.
    """
    vectors = coefficients.task_vectors
    models = [vectors.base, *vectors.checkpoints.values(), *vectors.files.values()]
    inputs = [source for model in models for source in (*model.sources, Path(model.location)) if source.exists()]
    with staged_folder(Path(target), overwrite=overwrite, inputs=inputs) as folder:
        for model in models:
            model.check()
        yield folder
        save_coefficients(coefficients, folder / COEFFICIENTS_FILE, origin)
        (folder / "README.md").write_text(card(coefficients), encoding="utf-8")
        for model in models:
            model.check()  # again: nothing may have changed while it was read


def check_names(layout: Layout, tasks: Sequence[str]) -> None:
    """Refuses what would be written, or read, outside the folder.

    Raises:
        CoefficientsError: a name is no plain file name.
    """
    folders = tasks if layout.heads else ()
    for name in (layout.weights, *layout.files, *layout.copied, *folders):
        if Path(name).name != name or name in {"", ".", ".."} or not (name.isascii() and name.isprintable()):
            raise CoefficientsError(
                f"the coefficient file names an unsafe file {quoted(name)}", expected="a plain file name"
            )


def check_task(coefficients: Coefficients, task: str) -> None:
    """Checks whether there is a head for a complete model.

    Raises:
        ConfigError: there is no such task, or its expert has no head of its own.
    """
    checkpoints, layout = coefficients.task_vectors.checkpoints, coefficients.layout
    if task not in checkpoints:
        raise ConfigError(f"there is no task '{task}'", expected=f"one of {list(checkpoints)}", got=task)
    if not _own_head(checkpoints[task], layout):
        raise ConfigError(
            f"expert '{task}' has no head of its own", todo="export without a task: the one model serves all tasks"
        )
    expert = checkpoints[task]
    if isinstance(expert, AdapterCheckpoint) and not (expert.sources[0].parent / CONFIG).is_file():
        raise ConfigError(
            f"expert '{task}' is an adapter, and which model its head belongs to is written nowhere",
            expected=f"a {CONFIG} with the head's classes beside the adapter's weights",
            todo=f"save the model's configuration there: model.config.save_pretrained({str(expert.sources[0].parent)!r})",
        )


def _own_head(expert: Checkpoint, layout: Layout) -> list[str]:
    """Returns the names of an expert's own head; a solver's vector has none, though it reads as its base with all names."""
    return [] if isinstance(expert, TaskVectorCheckpoint) else [name for name in expert if layout.is_head(name)]


def exported(coefficients: Coefficients, task: str | None) -> dict[str, Checkpoint]:
    """Returns the name of every tensor of the exported model to the model whose own it is; merged ones are the base's."""
    vectors, layout = coefficients.task_vectors, coefficients.layout
    if task is None:
        return dict.fromkeys(vectors.base, vectors.base)
    expert = vectors.checkpoints[task]
    trunk = {name: vectors.base for name in vectors.base if not layout.is_head(name)}
    return trunk | dict.fromkeys(_own_head(expert, layout), expert)


def headers(
    coefficients: Coefficients, task: str | None, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Returns dtype and shape of every exported tensor; they follow from the models' headers."""
    return {
        name: _entry(model, name, coefficients.layout.stored_as(name, dtype))
        for name, model in exported(coefficients, task).items()
    }


def _entry(model: Checkpoint, name: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.Size]:
    stored = model.dtype(name)
    return dtype if stored.is_floating_point else stored, model.shape(name)


def copy_files(layout: Layout, models: Sequence[Checkpoint], folder: Path, dtype: torch.dtype) -> None:
    """Copies the layout's files from the first model's folder that has them; the configuration names the new dtype.

    Raises:
        ExportError: no model has one of them.
    """
    homes = [model.sources[0].parent for model in models if model.sources]
    for name in layout.copied:
        source = next((home / name for home in homes if (home / name).is_file()), None)
        if source is None:
            raise ExportError(
                f"{models[-1].location} has no '{name}' beside its weights any more",
                expected=f"a folder with {list(layout.copied)}",
                todo="pass --base with the folder that the coefficients were learned on",
            )
        _copy(source, folder / name, dtype)


def write_heads(coefficients: Coefficients, folder: Path, dtype: torch.dtype) -> None:
    """Writes each expert's own head to ``heads/<task>/``, with the expert's configuration."""
    layout = coefficients.layout
    for task, expert in coefficients.task_vectors.checkpoints.items():
        own = _own_head(expert, layout)
        if own:
            home = folder / "heads" / task
            home.mkdir(parents=True)
            header = {name: _entry(expert, name, layout.stored_as(name, dtype)) for name in own}
            tensors = ((name, [expert[name].to(header[name][0])]) for name in own)
            verify_tensors(home / layout.weights, write_tensors(home / layout.weights, header, tensors))
            if expert.sources and (expert.sources[0].parent / CONFIG).is_file():
                _copy(expert.sources[0].parent / CONFIG, home / CONFIG, dtype)


def _copy(source: Path, target: Path, dtype: torch.dtype) -> None:
    refuse_outside(source)
    if source.name not in {CONFIG, TOKENIZER}:
        shutil.copyfile(source, target)
        return
    config = _without_paths(read_json(source))
    if source.name == CONFIG:
        config = _with_dtype(config, name_of(dtype))
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_dtype(config: Any, dtype: str) -> Any:
    """Returns the configuration, and those nested in it, with another dtype where they name one."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in {"dtype", "torch_dtype"} and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }


def _without_paths(config: Any) -> Any:
    """Returns the configuration, and those nested in it, without what says where on some machine it was read or made."""
    if not isinstance(config, dict):
        return config
    return {key: _without_paths(value) for key, value in config.items() if not (key in PLACES and is_path(value))}
