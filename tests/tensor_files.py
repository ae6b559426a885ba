"""What the tests of checkpoints and of their sources share: a small model of many dtypes, in shards with an index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adamerge.checkpoints.checkpoint import MERGEABLE
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def many_dtypes() -> dict[str, torch.Tensor]:
    """Return a small model of many dtypes; names are not sorted."""
    torch.manual_seed(0)
    floats = {f"w.{dtype}": torch.randn(3, 4).to(dtype) for dtype in sorted(MERGEABLE, key=str)}
    others = {"steps": torch.arange(5), "flag": torch.tensor(True), "codes": torch.randn(4).to(torch.float8_e4m3fn)}
    return floats | others | {"none": torch.zeros(0, 3), "bias": torch.randn(2)}


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write a folder of two shards with an index, and return its weight map."""
    folder.mkdir(parents=True)
    names = {name: SHARDS[place % 2] for place, name in enumerate(tensors)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if names[name] == shard}, folder / shard)
    save_index(folder, names)
    return names


def save_index(folder: Path, names: object) -> None:
    """Write the index of a sharded folder."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def refusal(source: object) -> str:
    """Open a source that must be refused, and return the first line of the message."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    return str(caught.value).splitlines()[0]
