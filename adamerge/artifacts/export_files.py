"""What an exported folder is made of: which model each tensor comes from, the files beside it, the experts' heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adamerge.artifacts.coefficients import Coefficients
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.lora import AdapterCheckpoint
from adamerge.checkpoints.origins import is_path
from adamerge.errors import CoefficientsError, ConfigError, ExportError
from adamerge.io.links import refuse_outside
from adamerge.io.model_folder import Layout
from adamerge.io.safetensors_file import quoted, read_json
from adamerge.io.safetensors_writer import verify_tensors, write_tensors

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
PLACES = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"}
"""Keys under which libraries write where a configuration was read from; nothing is loaded from there."""


def check_names(layout: Layout, tasks: Sequence[str]) -> None:
    """Refuse what would be written, or read, outside the folder.

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
    """See whether there is a head for a complete model.

    Raises:
        ConfigError: there is no such task, or its expert has no head of its own.
    """
    checkpoints, layout = coefficients.task_vectors.checkpoints, coefficients.layout
    if task not in checkpoints:
        raise ConfigError(f"there is no task '{task}'", expected=f"one of {list(checkpoints)}", got=task)
    if not any(layout.is_head(name) for name in checkpoints[task]):
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


def exported(coefficients: Coefficients, task: str | None) -> dict[str, Checkpoint]:
    """Name of every tensor of the exported model to the model whose own it is; merged ones are the base's."""
    vectors, layout = coefficients.task_vectors, coefficients.layout
    if task is None:
        return dict.fromkeys(vectors.base, vectors.base)
    expert = vectors.checkpoints[task]
    trunk = {name: vectors.base for name in vectors.base if not layout.is_head(name)}
    return trunk | {name: expert for name in expert if layout.is_head(name)}


def headers(
    coefficients: Coefficients, task: str | None, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Dtype and shape of every exported tensor; they follow from the models' headers."""
    return {
        name: _entry(model, name, coefficients.layout.stored_as(name, dtype))
        for name, model in exported(coefficients, task).items()
    }


def _entry(model: Checkpoint, name: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.Size]:
    stored = model.dtype(name)
    return dtype if stored.is_floating_point else stored, model.shape(name)


def copy_files(layout: Layout, models: Sequence[Checkpoint], folder: Path, dtype: torch.dtype) -> None:
    """Copy the layout's files from the first model's folder that has them; the configuration names the new dtype.

    Raises:
        ExportError: no model has one of them.
    """
    places = [model.sources[0].parent for model in models if model.sources]
    for name in layout.copied:
        source = next((place / name for place in places if (place / name).is_file()), None)
        if source is None:
            raise ExportError(
                f"{models[-1].location} has no '{name}' beside its weights any more",
                expected=f"a folder with {list(layout.copied)}",
                todo="pass --base with the folder that the coefficients were learned on",
            )
        _copy(source, folder / name, dtype)


def write_heads(coefficients: Coefficients, folder: Path, dtype: torch.dtype) -> None:
    """Each expert's own head in ``heads/<task>/``, with the expert's configuration."""
    layout = coefficients.layout
    for task, expert in coefficients.task_vectors.checkpoints.items():
        own = [name for name in expert if layout.is_head(name)]
        if own:
            place = folder / "heads" / task
            place.mkdir(parents=True)
            header = {name: _entry(expert, name, layout.stored_as(name, dtype)) for name in own}
            tensors = ((name, [expert[name].to(header[name][0])]) for name in own)
            verify_tensors(place / layout.weights, write_tensors(place / layout.weights, header, tensors))
            if expert.sources and (expert.sources[0].parent / CONFIG).is_file():
                _copy(expert.sources[0].parent / CONFIG, place / CONFIG, dtype)


def _copy(source: Path, target: Path, dtype: torch.dtype) -> None:
    refuse_outside(source)
    if source.name not in {CONFIG, TOKENIZER}:
        shutil.copyfile(source, target)
        return
    config = _without_paths(read_json(source))
    if source.name == CONFIG:
        config = _with_dtype(config, str(dtype).removeprefix("torch."))
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_dtype(config: Any, dtype: str) -> Any:
    """The configuration, and those nested in it, with another dtype where they name one."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in {"dtype", "torch_dtype"} and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }


def _without_paths(config: Any) -> Any:
    """The configuration, and those nested in it, without what says where on some machine it was read or made."""
    if not isinstance(config, dict):
        return config
    return {key: _without_paths(value) for key, value in config.items() if not (key in PLACES and is_path(value))}
