"""Configuration: YAML files and overrides to model, data and trainer settings, with errors that name the key."""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import adamerge
from adamerge.backbones.transformers import outlined
from adamerge.data import Calibration
from adamerge.errors import AdamergeError, ConfigError
from adamerge.io.public_names import PREFIX, current_name, is_public, private_names, renewed
from adamerge.io.versions import WRITTEN_BY
from adamerge.runs.config_files import NO_DATA, config_files, data_first, read_config
from adamerge.runs.help import DEFAULT_SEARCH, RUN_KEYS
from adamerge.runs.parser_faults import first_fault
from adamerge.training.merging import Merging
from adamerge.training.module import MergingModule

WIDEST_LINE = 400  # characters of a library's own message that are worth repeating
RENEWED = "yaml with today's names"
set_loader(RENEWED, lambda text: renewed(get_loader("yaml")(text)), exceptions=(yaml.YAMLError,))


class ConfigCLI(LightningCLI):
    """The configuration of a run: ``--config POOL --config METHOD`` and overrides, in either order of the files.

    Args:
        args: as on the command line.

    Raises:
        ConfigError: a file, a key or a value cannot be used.
        AdamergeError: a part refused its arguments.
    """

    def __init__(self, args: Sequence[str]) -> None:
        _quieten()
        self._given = list(args)
        for path in config_files(args):
            read_config(Path(path))
        _load_named(args)
        try:
            super().__init__(
                MergingModule,
                Calibration,
                subclass_mode_data=True,
                save_config_callback=None,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                run=False,
                args=[_renewed_word(word) for word in data_first(args)],
                parser_kwargs={
                    "prog": "adamerge fit",
                    "exit_on_error": False,
                    "parser_mode": RENEWED,
                    "dump_header": [WRITTEN_BY],
                },
            )
        except (argparse.ArgumentError, ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise self._readable(error) from error
        refuse_private(self.config.as_dict())

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is merged, the data, and the trainer."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_class_arguments(Merging, "model", fail_untyped=False, instantiate=True, sub_configs=True)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where the run's folder is, and defaults that suit a fit of one pass over its steps."""
        parser.add_argument("--tasks", type=list[str] | None, default=None, help=RUN_KEYS["tasks"])
        parser.add_argument("--leave_out", type=list[str] | None, default=None, help=RUN_KEYS["leave_out"])
        parser.add_argument("--runs", default="runs", help=RUN_KEYS["runs"])
        parser.add_argument("--name", type=str | None, default=None, help=RUN_KEYS["name"])
        parser.add_argument("--id", type=str | None, default=None, help=RUN_KEYS["id"])
        parser.set_defaults(
            {
                "trainer.max_epochs": 1,
                "trainer.log_every_n_steps": 10,
                "trainer.num_sanity_val_steps": 0,
                "trainer.use_distributed_sampler": False,
                "trainer.enable_model_summary": False,
                "data": {"class_path": NO_DATA},
                "model.search": {"class_path": DEFAULT_SEARCH},
            }
        )

    def before_instantiate_classes(self) -> None:
        """Leave of experts and data what ``tasks`` names and ``leave_out`` does not; nothing else is opened."""
        experts = self.config.get("model.task_vectors.init_args.experts") or {}
        self._leave_out(experts)
        if self.config.tasks is None:
            return
        data = self.config.get("data.init_args.tasks")
        if data is None:
            raise ConfigError(
                f"tasks: the pool's data have no tasks to choose from, got {self.config.tasks}",
                todo=f"--data.only='[{','.join(self.config.tasks)}]' takes the data of these alone, --leave_out experts away",
            )
        unknown = [task for task in self.config.tasks if task not in data]
        if unknown or not self.config.tasks:
            what = f"tasks: the pool has no '{unknown[0]}'" if unknown else "tasks: none are named"
            raise ConfigError(what, expected=f"of {list(data)}", got=self.config.tasks)
        for mapping in (experts, data):
            for task in set(mapping) - set(self.config.tasks):
                del mapping[task]

    def _leave_out(self, experts: dict[str, Any]) -> None:
        unknown = [task for task in self.config.leave_out or () if task not in experts]
        if unknown:
            raise ConfigError(
                f"leave_out: the pool has no expert '{unknown[0]}'", expected=f"of {list(experts)}", got=unknown
            )
        for task in self.config.leave_out or ():
            del experts[task]
        self.config.leave_out = None  # done: the run's own configuration names the experts that are left

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Later, with ``trainer_with``: callbacks must know the run's folder."""
        return None  # type: ignore[return-value]

    @property
    def loggers(self) -> Any:
        """What ``trainer.logger`` says: loggers, whether there are any, or nothing."""
        return self.config_init.trainer.logger

    @property
    def callbacks(self) -> list[Any]:
        """What ``trainer.callbacks`` says: one, several or none."""
        given = self.config_init.trainer.callbacks or ()
        return list(given) if isinstance(given, list | tuple) else [given]

    def trainer_with(self, callbacks: Sequence[Any], **kwargs: Any) -> Trainer:
        """The configured trainer, with these arguments and callbacks added, but for those of a class that it has.

        Raises:
            ConfigError: Lightning refuses a setting.
        """
        own = self.callbacks
        known = set(map(type, own))
        callbacks = [*own, *(callback for callback in callbacks if type(callback) not in known)]
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: {_short(str(error))}") from error

    def _readable(self, error: BaseException) -> AdamergeError:
        """The typed error inside a library's, or its message with the key first."""
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, AdamergeError):
                return seen
            seen = seen.__cause__ or seen.__context__
        found = first_fault(self._given)
        return found if found is not None else ConfigError(f"configuration: {_short(str(error))}")


class FitCLI(ConfigCLI):
    """The same for a fit: where nothing is learned, and so nothing run, networks have names and shapes but no weights."""

    def instantiate_classes(self) -> None:
        """Everything but the trainer."""
        model = self.config.model
        runs = model.get("objective") is not None or model.get("recalibrate_buffers")
        with nullcontext() if runs else outlined():
            super().instantiate_classes()
            self.model = MergingModule(self.model)


class Parsed(ConfigCLI):
    """The same without making anything: keys and values are checked, and no model is opened."""

    def instantiate_classes(self) -> None:
        """Nothing."""


def _renewed_word(word: str) -> str:
    """``--key=value``, or one of the two, with today's name where the value is a former one."""
    key, equals, value = word.partition("=")
    return f"{current_name(key)}{equals}{current_name(value)}"


def refuse_private(config: Any) -> None:
    """Refuse parts of the package by the modules that hold them: a run's own configuration could not be read again.

    Raises:
        ConfigError: one is named so.
    """
    for name in private_names(config):
        last = name.rpartition(".")[2]
        raise ConfigError(
            f"adamerge has no part '{name}'",
            todo=f"name it {PREFIX}{last}" if is_public(PREFIX + last) else "only its public names can be given",
        )


def trainer_help() -> str:
    """All keys of Lightning's trainer."""
    parser = LightningArgumentParser(prog="adamerge fit", usage="adamerge fit POOL METHOD [--trainer.KEY=VALUE ...]")
    parser.add_lightning_class_args(Trainer, "trainer")
    text: str = parser.format_help()
    return text


def _load_named(arguments: Sequence[str]) -> None:
    """Load the public classes that go by their short names: the parser knows those that are there."""
    text = "\n".join([*arguments, *(Path(path).read_text(encoding="utf-8") for path in config_files(arguments))])
    for name in {*re.findall(r"\w+", text)} & {*adamerge.__all__}:
        getattr(adamerge, name)


def _short(message: str) -> str:
    """One line of a message of many; where alternatives were tried, what was wrong with the first."""
    problem = re.search(
        r"Problem with given class_path '([^']*)':\s*(.*?)(?=\n\s*- Expected a <class 'NoneType'>|$)", message, re.S
    )
    key = re.search(r'Parser key "([^"]*)"', message)
    if problem:
        message = f"{key[1] + ': ' if key else ''}{problem[1]}: {problem[2]}"
    line = " ".join(message.split())
    return line if len(line) <= WIDEST_LINE else line[:WIDEST_LINE] + " …"


def _quieten() -> None:
    """Leave out what libraries say that is no news to our users."""
    for text in (
        "args parameter is intended",
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
