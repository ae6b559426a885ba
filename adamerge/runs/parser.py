"""The parser: from a configuration as data to typed settings, with errors that name the key; nothing is made or opened."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

import adamerge
from adamerge.data import Calibration
from adamerge.errors import AdamergeError, ConfigError
from adamerge.io.public_names import PREFIX, find
from adamerge.io.task_vector_file import holds_task_vectors
from adamerge.runs.config_files import refuse_private
from adamerge.runs.configuration import DEFAULTS, Configuration, configurations
from adamerge.runs.former_keys import renewed_key
from adamerge.runs.help import RUN_KEYS
from adamerge.runs.parser_faults import first_fault
from adamerge.runs.seeds import seed_all
from adamerge.runs.trainer_keys import OURS, Trainer, names_classes
from adamerge.training import Merging

WIDEST_LINE = 400  # characters of a library's own message that are worth repeating


def read(configuration: Configuration) -> Namespace:
    """Returns the settings of a fit, or of one stage: each key known, each value of its type, each class there.

    Experts and data that ``tasks`` and ``leave_out`` leave away are not among them. Lightning is imported where the trainer's
    settings name classes, and a module of the user's where a class of it is named.

    Raises:
        ConfigError: a key, a value or a class cannot be used.
    """
    with configuration.named(), plain_names():
        content = configuration.content
        _load_named(content)
        try:
            settings = parser_of(content).parse_object(content)
        except (argparse.ArgumentError, ValueError, TypeError, ImportError) as error:
            raise readable(error, configuration.plain) from error
        refuse_private(settings.as_dict())
        _narrow(settings)
        seed_all(settings)
        return settings


def read_first(arguments: Any, verb: str = "fit") -> Namespace:
    """Returns the settings of a command line; of the first stage where the method has several."""
    return read(configurations(arguments, verb)[0])


def parser_of(content: Mapping[str, Any]) -> ArgumentParser:
    """Returns the parser of a configuration; Lightning's own takes the trainer's section where it names classes."""
    trainer: Any = Trainer
    if names_classes(content.get("trainer") or {} if isinstance(content.get("trainer"), Mapping | None) else {}):
        from lightning import Trainer as trainer
    return _kept_parser(trainer)


def _parser(trainer: type) -> ArgumentParser:
    """Returns a parser whose trainer's section is this class's; it takes a fifth of a read to make."""
    parser = ArgumentParser(prog="adamerge fit", exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_class_arguments(trainer, "trainer", fail_untyped=False, instantiate=False)
    parser.set_defaults({f"trainer.{key}": value for key, value in OURS.items()})
    parser.add_class_arguments(Merging, "model", fail_untyped=False)
    parser.add_subclass_arguments(Calibration, "data", fail_untyped=False, required=False)
    for key in ("tasks", "leave_out"):
        parser.add_argument(f"--{key}", type=list[str] | None, default=None, help=RUN_KEYS[key])
    parser.add_argument("--seed", type=int | None, default=None, help=RUN_KEYS["seed"])
    parser.add_argument("--runs", type=str, default="runs", help=RUN_KEYS["runs"])
    for key in ("name", "id"):
        parser.add_argument(f"--{key}", type=str | None, default=None, help=RUN_KEYS[key])
    return parser


_kept_parser = cache(_parser)
"""For settings as data, which leave a parser as it is; words of a command line add actions to it."""


def as_data(settings: Namespace, skip_default: bool = False) -> dict[str, Any]:
    """Returns settings as plain data, as a file of them holds it."""
    with warnings.catch_warnings(), plain_names():
        warnings.simplefilter("ignore", DeprecationWarning)  # of skip_none, which older versions of the parser need
        text = parser_of(settings.as_dict()).dump(settings, skip_none=False, skip_check=True, skip_default=skip_default)
    return dict(yaml.safe_load(text) or {})


def help_by_parser(flag: str, search: str = DEFAULTS["model.search"]) -> str:
    """Returns the help of a class that is not of this package, for ``--KEY.help=CLASS``.

    Args:
        flag: as it was given.
        search: class of the search, one of whose arguments the key may be.

    Raises:
        ConfigError: there is no such class or key.
    """
    key = renewed_key(flag.removeprefix("--"))
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit), plain_names():
        _load_named([search])
        try:
            _parser(Trainer).parse_args([f"--model.search={search}", f"--{key}"])
        except (argparse.ArgumentError, ValueError, TypeError, ImportError) as error:
            raise readable(error) from error
    return printed.getvalue()


def trainer_help() -> str:
    """Returns the help of all keys of Lightning's trainer."""
    from lightning import Trainer as Lightnings

    parser = ArgumentParser(prog="adamerge fit", usage="adamerge fit POOL METHOD [--trainer.KEY=VALUE ...]")
    parser.add_class_arguments(Lightnings, "trainer", fail_untyped=False)
    text: str = parser.format_help()
    return text


def readable(error: BaseException, content: Mapping[str, Any] | None = None) -> AdamergeError:
    """Returns the typed error inside a library's, or its message with the key first.

    Args:
        error: of a library.
        content: the configuration that it refused, whose first fault is looked for.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, AdamergeError):
            return seen
        seen = seen.__cause__ or seen.__context__
    fault = first_fault(content) if content is not None else None
    return fault if fault is not None else ConfigError(f"configuration: {short(str(error))}")


def short(message: str) -> str:
    """Returns one line of a library's message of many; where alternatives were tried, what was wrong with the first.

    The patterns are those of jsonargparse 4.53: ``Parser key "model.objective": Does not validate against any of the Union
    subtypes ... Problem with given class_path 'mypaper.Halved': ... - Expected a <class 'NoneType'>``.
    """
    problem = re.search(
        r"Problem with given class_path '([^']*)':\s*(.*?)(?=\n\s*- Expected a <class 'NoneType'>|$)", message, re.S
    )
    key = re.search(r'Parser key "([^"]*)"', message)
    if problem:
        message = f"{key[1] + ': ' if key else ''}{problem[1]}: {problem[2]}"
    line = " ".join(message.split())
    return line if len(line) <= WIDEST_LINE else line[:WIDEST_LINE] + " …"


@contextlib.contextmanager
def plain_names() -> Iterator[None]:
    """Lets ``adamerge.ImageCalibration`` and its like be the plain classes meanwhile.

    The parser looks them up by these names, whether they are asked for or not, and the data modules that they are otherwise
    import Lightning. A user's class of data that is imported here derives from the plain ones, and a fit makes a data module
    of any.
    """
    own = vars(adamerge)
    names = [name for name in adamerge.DATA_MODULES if name not in own]
    own.update({name: find(f"{PREFIX}{name}") for name in names})
    try:
        yield
    finally:
        for name in names:
            del own[name]


def _narrow(settings: Namespace) -> None:
    """Removes from settings the experts and data that ``tasks`` does not name or ``leave_out`` names."""
    experts = settings.get("model.task_vectors.init_args.experts") or {}
    unknown = [task for task in settings.leave_out or () if task not in experts]
    if unknown:
        raise ConfigError(
            f"leave_out: the pool has no expert '{unknown[0]}'", expected=f"of {list(experts)}", got=unknown
        )
    for task in settings.leave_out or ():
        experts.pop(task, None)
    if settings.leave_out and not experts:
        raise ConfigError("leave_out: no expert is left", got=settings.leave_out)
    settings.leave_out = None  # done: the run's own configuration names the experts that are left
    if settings.tasks is None:
        return
    data = settings.get("data.init_args.tasks")
    if data is None:
        raise ConfigError(
            f"tasks: the pool's data have no tasks to choose from, got {settings.tasks}",
            todo=f"--data.only='[{','.join(settings.tasks)}]' takes the data of these alone, --leave_out experts away",
        )
    unknown = [task for task in settings.tasks if task not in data]
    if unknown or not settings.tasks:
        what = f"tasks: the pool has no '{unknown[0]}'" if unknown else "tasks: none are named"
        raise ConfigError(what, expected=f"of {list(data)}", got=settings.tasks)
    for task in set(experts) - set(settings.tasks):
        if task in data or not holds_task_vectors(experts[task]):  # what a stage has solved is no task's
            del experts[task]
    for task in set(data) - set(settings.tasks):
        del data[task]


def _load_named(content: Any) -> None:
    """Loads the public classes that go by their short names: the parser knows those that are there."""
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    for value in values:
        if isinstance(value, str) and value in adamerge.HOMES:
            find(f"{PREFIX}{value}")
        _load_named(value)
