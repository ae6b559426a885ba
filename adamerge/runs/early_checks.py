"""Parts of a fit that open nothing, made from its settings; and all that is known of them before anything is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from adamerge.backbones import Backbone
from adamerge.backbones.zero_shot_head import check_templates
from adamerge.data import Calibration
from adamerge.data.classes import ClassCalibration
from adamerge.errors import CoefficientsError, DataError
from adamerge.io.unwritten import is_unwritten
from adamerge.runs.class_names import class_named
from adamerge.runs.parser import plain_names, readable
from adamerge.runs.trainer_settings import check_length
from adamerge.training.merging import Method
from adamerge.training.method_checks import FitSettings, check_method


@dataclass(frozen=True)
class Parts:
    """The parts of a fit that are made of its settings without opening base, experts or data.

    Attributes:
        method: how is merged, and what drives it.
        data: on which it is learned.
    """

    method: Method
    data: Calibration


def checked_parts(settings: Namespace) -> Parts:
    """Makes the parts of a fit, and checks that they go together.

    Raises:
        AdamergeError: as ``parts_of`` and ``refuse_parts``.
    """
    parts = parts_of(settings)
    refuse_parts(settings, parts)
    return parts


def parts_of(settings: Namespace) -> Parts:
    """Makes the parts of a fit that open nothing.

    Raises:
        AdamergeError: one refuses its arguments.
    """
    seed = settings.seed_everything
    if isinstance(seed, int) and not isinstance(seed, bool):
        torch.manual_seed(seed)  # an objective may draw what it trains
    model = vars(settings.model)
    given = {name: value for name, value in model.items() if name not in {"backbone", "task_vectors"}}
    method: Method = made(Method, Namespace(**given))
    return Parts(method, made_subclass(Calibration, settings.data))


def refuse_parts(settings: Namespace, parts: Parts) -> None:
    """Checks that the parts of a fit go together, before a library of networks is loaded.

    Raises:
        AdamergeError: they do not, or a file or folder is not there.
    """
    method, data = parts.method, parts.data
    backbone = arguments_of(settings.model.backbone)
    kind = None
    if settings.model.backbone is not None:
        kind = class_named("model.backbone", settings.model.backbone.class_path, Backbone)
        kind.refuse_early(backbone)
    if method.objective is not None:
        check_length(vars(settings.trainer))
    experts = arguments_of(settings.model.task_vectors).get("experts") or {}
    tasks = arguments_of(settings.data).get("tasks")  # data that are asked may open a task for the names of its classes
    dtype = getattr(torch, str(backbone.get("dtype") or "float32"), torch.float32)
    check_method(method, experts, dtype, data, tasks=tasks, fit=fit_settings(settings, validated=False))
    _check_start(method)
    if method.sees_inputs:
        _check_folders(settings)
        if kind is not None and kind.zero_shot and isinstance(data, ClassCalibration):
            for task, source in data.sources.items():
                check_templates(task, source.words.templates)


def fit_settings(settings: Namespace, validated: bool) -> FitSettings:
    """Returns the trainer's settings that the checks of a fit need; ``validated``: whether validation data are read."""
    trainer = settings.trainer
    return FitSettings(trainer.max_steps, str(trainer.precision), bool(trainer.gradient_clip_val), validated)


def made(kind: type, given: Namespace) -> Any:
    """Returns an instance of a class, made with its arguments as they are in settings.

    Raises:
        AdamergeError: a class refuses its arguments.
    """
    return _instantiated("add_class_arguments", kind, given)


def arguments_made(kind: type, given: Namespace) -> dict[str, Any]:
    """Returns a class's arguments with all parts among them made, and not the class itself.

    Raises:
        AdamergeError: a class refuses its arguments.
    """
    return dict(vars(_instantiated("add_class_arguments", kind, given, instantiate=False)))


def made_subclass(kind: type, given: Namespace) -> Any:
    """Returns an instance of the subclass of ``kind`` that settings name, made with its arguments.

    Raises:
        AdamergeError: the class refuses its arguments.
    """
    return _instantiated("add_subclass_arguments", kind, given)


def arguments_of(spec: Namespace | None) -> dict[str, Any]:
    """Returns the arguments of a class in settings; none where there is no class."""
    return {} if spec is None else dict(vars(spec.get("init_args") or Namespace()))


def _instantiated(how: str, kind: type, given: Namespace, **options: Any) -> Any:
    try:
        with plain_names():
            return _parser_of(how, kind, **options).instantiate_classes(Namespace(part=given)).part
    except (ValueError, TypeError, ImportError) as error:
        raise readable(error) from error


@cache
def _parser_of(how: str, kind: type, **options: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    getattr(parser, how)(kind, "part", fail_untyped=False, **options)
    return parser


def _check_start(method: Method) -> None:
    if method.init_from is None or is_unwritten(method.init_from):
        return
    path = os.path.abspath(os.path.expanduser(method.init_from))
    if not os.path.isfile(path):
        raise CoefficientsError(
            f"model.init_from: '{path}': no such file",
            todo="name the coefficients.safetensors of a run, or leave it out",
        )


def _check_folders(settings: Namespace) -> None:
    """Checks that data sets written as paths exist; other names are left to the library that loads them."""
    for task, source in (arguments_of(settings.data).get("tasks") or {}).items():
        path = source.get("init_args", source).get("dataset") if isinstance(source, Namespace) else None
        if not isinstance(path, str) or not path.startswith((".", "/", "~")):
            continue
        if not os.path.exists(os.path.expanduser(path)):
            raise DataError(f"task '{task}': there is no folder {path}", todo=f"correct data.tasks.{task}.dataset")
