"""A configured fit: its module, its data and its trainer, made from one set of settings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning import Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException

from adamerge.backbones import Backbone
from adamerge.data import Calibration
from adamerge.errors import ConfigError
from adamerge.runs.class_names import class_named
from adamerge.runs.early_checks import Parts, arguments_made, checked_parts, made_subclass
from adamerge.runs.parser import read_first, short
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.data_modules import DataModule, of
from adamerge.training.merging import Merging
from adamerge.training.module import MergingModule


class Configured:
    """Makes model, data and trainer of a fit from its settings.

    Args:
        settings: as ``read`` returns them.
        parts: made of them already; made now when None.

    Attributes:
        settings: of the fit.
        model: the Lightning module.
        datamodule: its data.

    Raises:
        AdamergeError: a part refuses its arguments, or models or data cannot be used.
    """

    def __init__(self, settings: Namespace, parts: Parts | None = None) -> None:
        parts = checked_parts(settings) if parts is None else parts
        _quieten()
        if settings.seed_everything is not False:
            given = None if settings.seed_everything is True else settings.seed_everything
            seed_everything(given, workers=True)
        self.settings, self.datamodule = settings, _data_module(settings)
        method = parts.method
        spec = settings.model.task_vectors
        kind = class_named("model.task_vectors", spec.class_path, TaskVectors)
        vectors = kind(**arguments_made(kind, spec.init_args))
        backbone = made_subclass(Backbone, settings.model.backbone)
        self.model = MergingModule(Merging(backbone=backbone, task_vectors=vectors, **vars(method)))
        self._trainer = arguments_made(Trainer, settings.trainer)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Configured:
        """Returns the fit that a command line configures; that of the first stage where the method has several."""
        return cls(read_first(arguments))

    @property
    def loggers(self) -> Any:
        """Value of ``trainer.logger``: loggers, whether there are any, or None."""
        return self._trainer["logger"]

    @property
    def callbacks(self) -> list[Any]:
        """Callbacks that ``trainer.callbacks`` names, as a list."""
        given = self._trainer["callbacks"] or ()
        return list(given) if isinstance(given, list | tuple) else [given]

    def trainer_with(self, callbacks: Sequence[Any], **changes: Any) -> Trainer:
        """Returns the configured trainer, with these arguments and callbacks added, but for those of a class that it has.

        Raises:
            ConfigError: Lightning refuses a setting.
        """
        own = self.callbacks
        known = set(map(type, own))
        added = [callback for callback in callbacks if type(callback) not in known]
        try:
            return Trainer(**{**self._trainer, **changes, "callbacks": [*own, *added]})
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: {short(str(error))}") from error


def _data_module(settings: Namespace) -> DataModule:
    kind: Any = of(class_named("data", settings.data.class_path, Calibration))
    made: DataModule = kind(**arguments_made(kind, settings.data.init_args))
    return made


def _quieten() -> None:
    """Silences messages of libraries that are no news to users of this package."""
    for text in (
        "LeafSpec",
        "exists and is not empty",
        "does not have many workers",
        "smaller than the logging interval",
        "no pre-optimization state was saved",
        "dataloader is not resumable",  # ours is: a step's batch follows from its number
        "dirpath has changed",
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
