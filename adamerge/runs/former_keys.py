"""Former keys: what a configuration of an earlier version, or a word that its user still knows, is called today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adamerge.runs.overrides import nested, overlaid

FORMER_KEYS = {
    "search": "model.search.class_path",
    "model.lr": "model.search.lr",
    "model.optimizer": "model.search.optimizer",
    "model.lr_scheduler": "model.search.schedule",
    "model.inner_lr": "model.search.inner_lr",
    "model.inner_optimizer": "model.search.inner_optimizer",
    "model.inner_lr_scheduler": "model.search.inner_schedule",
    "model.fresh_noise": "model.search.fresh_noise",
}
"""Keys until version 0.2, where the class of ``model`` was the search, to today's."""


def renewed_key(key: str) -> str:
    """Returns today's name of a key, or of a key below it."""
    for former, today in FORMER_KEYS.items():
        if key == former or key.startswith(f"{former}.") or key == f"{former}+":
            return today + key.removeprefix(former)
    return key


def renewed_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a file's content with today's keys; what stands under today's key already is laid over it."""
    today, rest = dict[str, Any](), dict(content)
    for former, key in FORMER_KEYS.items():
        group, _, name = former.rpartition(".")
        holder = rest.get(group) if group else rest
        if not isinstance(holder, dict) or name not in holder:
            continue
        value, holder = holder[name], {one: own for one, own in holder.items() if one != name}
        rest = {**rest, group: holder} if group else holder
        if value is not None or not key.endswith("class_path"):
            today = overlaid(today, nested(today, key.split("."), value, key))
    return dict(overlaid(today, rest)) if today else rest
