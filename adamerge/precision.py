"""Precision: merges and contractions compute in fp32 as they are written, whatever the network's passes may round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast on ``device``, and products of fp32 matrices in fp32: what was set for the network holds again afterwards.

    Args:
        device: of what is computed inside.
    """
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [product.fp32_precision for product in products]
    with torch.autocast(device.type, enabled=False):
        if all(precision in {"none", "ieee"} for precision in before):
            yield
            return
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
                for product, precision in zip(products, before, strict=True):
                    product.fp32_precision = precision
