"""A strategy of Lightning's trainer as a type, without Lightning: see ``adamerge/data/dataset.py`` for why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
else:
    Strategy = Any

__all__ = ["Strategy"]
