"""Held coefficients by name: what a file says of those that were not learned although they could have been."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

HELD = "held"
"""The word for them in a coefficient file's protocol and in a run's summary."""


def held_names(held: Mapping[str, Tensor], experts: Sequence[str]) -> dict[str, Any]:
    """Returns plain data: ``{"held": {group: places}}`` of the group's coefficients, or by expert where experts differ.

    Where they differ it is ``{"held": {group: {expert: places}}}``; nothing at all where nothing is held.

    Args:
        held: group name to booleans, ``(experts, coefficients of the group)``.
        experts: their names, in the order of the rows.
    """
    named: dict[str, Any] = {}
    for group, mask in held.items():
        rows = [[place for place, own in enumerate(row) if own] for row in mask.tolist()]
        if all(row == rows[0] for row in rows):
            named |= {group: rows[0]} if rows[0] else {}
        else:
            named[group] = {expert: row for expert, row in zip(experts, rows, strict=True) if row}
    return {HELD: named} if named else {}


def held_masks(protocol: Mapping[str, Any], values: Mapping[str, Tensor], experts: Sequence[str]) -> dict[str, Tensor]:
    """Returns booleans of the groups that hold any coefficient, on the CPU, from the plain data of ``held_names``.

    Args:
        protocol: of a coefficient file; what it says of groups and experts that there are not does not count.
        values: of the file: group name to ``(experts, coefficients of the group)``.
        experts: their names, in the order of the rows.
    """
    named = protocol.get(HELD)
    masks = {}
    for group, places in named.items() if isinstance(named, Mapping) else ():
        if group in values:
            mask = torch.zeros(values[group].shape, dtype=torch.bool)
            for row, expert in enumerate(experts):
                own = places.get(expert, []) if isinstance(places, Mapping) else places
                mask[row, [place for place in own if type(place) is int and 0 <= place < mask.shape[1]]] = True
            masks[group] = mask
    return masks
