"""Dtypes: torch's, the names that the safetensors format gives them, and those that a configuration may name."""

from __future__ import annotations

import torch

from adamerge.errors import ConfigError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}
"""The format's name of a dtype to torch's; F6_E2M3 and F6_E3M2 have none."""

FORMAT_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""What the safetensors format calls a dtype."""

FLOATS = ("float32", "bfloat16", "float16")
"""Names of the dtypes that weights, deltas and logits may have, as configurations write them."""


def torch_dtype(name: str, who: str) -> torch.dtype:
    """Returns the dtype that a configuration names.

    Args:
        name: one of ``FLOATS``.
        who: whose dtype it is, for the error.

    Raises:
        ConfigError: it is none of these.
    """
    if name not in FLOATS:
        raise ConfigError(f"{who}: there is no dtype '{name}'", expected=f"one of {list(FLOATS)}", got=name)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """Returns how configurations and files write a dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")
