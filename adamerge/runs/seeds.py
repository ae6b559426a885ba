"""Seeds: one number for all that a fit draws, in its data, its parts and its libraries, while the splits stay."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace


def seed_all(settings: Namespace) -> None:
    """Lets all that is drawn in a fit follow ``settings.seed``, where that is given; it is settled then, and None again.

    Every argument ``seed`` of a part of the model or of the data becomes that number: order of batches, drawn samples, masks,
    partitions, dropped entries, views. ``seed_everything`` does too, for what libraries draw. Splits that are drawn from
    train are drawn as before: a fit with another seed would otherwise be calibrated on what this one is tested on.
    """
    seed = settings.pop("seed")
    settings.seed = None
    if seed is None:
        return
    settings.seed_everything = seed
    data = settings.data.get("init_args") or Namespace()
    if data.get("splits_seed") is None and "splits_seed" in data and "seed" in data:
        data.splits_seed = data.seed
    for section in (settings.model, settings.data):
        _seed(section, seed)


def _seed(value: Any, seed: int) -> None:
    """Sets every whole number that is called ``seed`` in a configuration, or in a part of it."""
    if isinstance(value, list):
        for item in value:
            _seed(item, seed)
    if not isinstance(value, dict | Namespace):
        return
    mapping = vars(value) if isinstance(value, Namespace) else value
    for key, item in mapping.items():
        if key == "seed" and type(item) is int:
            mapping[key] = seed
        else:
            _seed(item, seed)
