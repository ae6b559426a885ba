"""Origins: what a model is called where others read it: a Hub id where one is known, and never a path of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.lora import AdapterCheckpoint
from adamerge.checkpoints.opening import is_hub_id
from adamerge.errors import CheckpointError
from adamerge.io.untrusted_files import read_json

LOCAL = "local:"
"""A model that is only on the machine that wrote the file is called this, followed by the last name of its path."""

_CACHED = re.compile(r"/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>\w+)(/|$)")


def origin(model: Checkpoint) -> str:
    """Returns from where anyone can open the very same model: Hub id or package; else ``local:`` and its last name."""
    cached = next((match for source in model.sources if (match := _CACHED.search(source.as_posix()))), None)
    if model.location.startswith("package:") or is_hub_id(model.location):
        return model.location
    return "{owner}/{name}@{revision}".format(**cached.groupdict()) if cached else LOCAL + Path(model.location).name


def base_name(base: Checkpoint, experts: Iterable[Checkpoint]) -> str | None:
    """Returns the base's Hub id: its own, what adapters call their base, or what its configuration calls itself; or None."""
    own = origin(base)
    names = [own.partition("@")[0]] if not own.startswith((LOCAL, "package:")) else []
    names += [expert.base_name for expert in experts if isinstance(expert, AdapterCheckpoint)]
    if base.sources:
        names.append(_called(base.sources[0].parent / "config.json"))
    return next((name for name in names if is_hub_id(name) and not is_path(name)), None)


def is_path(name: object) -> bool:
    """Returns whether what a configuration calls a model or file is a path of some machine."""
    return isinstance(name, str) and (bool(re.match(r"[/~.\\]|[A-Za-z]:[/\\]", name)) or os.path.exists(name))


def shown(model: Checkpoint) -> str:
    """Returns the origin as cards show it."""
    return origin(model).removeprefix(LOCAL)


def _called(config: Path) -> str:
    try:
        return str(read_json(config).get("_name_or_path") or "")
    except CheckpointError:
        return ""
