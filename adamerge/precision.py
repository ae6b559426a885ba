"""Precision: merges and contractions compute in fp32 as they are written, whatever the network's passes may round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from adamerge.errors import ConfigError


def exact(device: torch.device) -> AbstractContextManager[None]:
    """No autocast on ``device``, and products of fp32 matrices in fp32: what was set for the network holds again afterwards.

    Args:
        device: of what is computed inside.
    """
    # a merge asks for every tensor, and most often there is nothing to change
    return _unrounded(device) if torch.is_autocast_enabled(device.type) or _rounds() else nullcontext()


def _products() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _rounds() -> bool:
    return any(product.fp32_precision not in {"none", "ieee"} for product in _products())


@contextmanager
def _unrounded(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False):
        if not _rounds():
            yield
            return
        before = [product.fp32_precision for product in _products()]
        try:
            chosen = torch.get_float32_matmul_precision()
        except RuntimeError:  # it was chosen library by library
            chosen = None
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if chosen is not None:
                torch.set_float32_matmul_precision(chosen)
            else:
                for product, precision in zip(_products(), before, strict=True):
                    product.fp32_precision = precision


SUITABLE_PRECISION = {"32", "32-true", "bf16", "bf16-mixed", "None"}


def check_precision(precision: str, dtype: torch.dtype) -> None:
    """See whether gradients of the merged copy come through.

    Args:
        precision: of the trainer.
        dtype: of the merged copy.

    Raises:
        ConfigError: they do not.
    """
    if precision not in SUITABLE_PRECISION:
        raise ConfigError(
            f"trainer.precision={precision} does not suit: coefficients must stay fp32, and gradients reach the merged "
            "copy without loss scaling",
            expected="32-true or bf16-mixed",
            got=precision,
            todo="backbone.dtype sets the merged copy's own dtype",
        )
    if dtype == torch.float16:
        raise ConfigError("backbone.dtype=float16: gradients would underflow", expected="float32 or bfloat16")
