"""A LoRA adapter as an expert: factors by the base's on-disk names, and whole tensors where it has some."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint, SafetensorsCheckpoint, Scan
from adamerge.checkpoints.lora_config import by_pattern, read_configuration
from adamerge.checkpoints.lora_factors import Factors, matrix_shape, no_change
from adamerge.checkpoints.prefix_matching import Renaming
from adamerge.errors import CheckpointError
from adamerge.io.dtypes import FORMAT_NAMES
from adamerge.io.pickles import described
from adamerge.io.safetensors_file import TensorFile
from adamerge.io.tensor_bytes import byte_chunks
from adamerge.io.untrusted_files import listed, quoted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Pair:
    """Where the factors of one tensor are.

    Attributes:
        module: peft's name of the layer.
        a: key of A.
        b: key of B.
        rank: of the product.
        scale: of the product.
        turned: whether the tensor's change is the transpose of ``scale * B @ A``.
    """

    module: str
    a: str
    b: str
    rank: int
    scale: float
    turned: bool

    @property
    def embedding(self) -> bool:
        """Whether it is of an embedding, whose factors have other keys."""
        return self.a.endswith("lora_embedding_A")


class AdapterCheckpoint(Checkpoint):
    """A base as a LoRA adapter changes it: reads as a whole model, and gives its changes as factors.

    A tensor that the adapter does not touch is the base's, with factors of rank 0.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``, as peft writes them.
        base: the model it belongs to; decides names, shapes, and which way round a factor is.
        location: what errors print; the folder when None.

    Attributes:
        base_name: what the configuration calls its base; recorded, since names decide nothing.
        config: the whole configuration.
        pairs: the base's tensor name to where its factors are.

    Raises:
        CheckpointError: unreadable or unsafe files, a kind of adapter whose change is not ``scale * B @ A``, or factors
            that do not fit the base.

    Reference: LoRA (Hu et al., 2022), https://arxiv.org/abs/2106.09685; rank-stabilised scaling (Kalajdzievski, 2023),
    https://arxiv.org/abs/2312.03732.
    """

    def __init__(self, folder: Path, base: Checkpoint, location: str | None = None) -> None:
        self.location, self.base = location or str(folder), base
        self._place = quoted(self.location)
        config = read_configuration(folder / CONFIG)
        if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
            what = f"{self._place} has its weights only as pickle, which may run code when opened: 'adapter_model.bin'"
            advice = described(folder / "adapter_model.bin")[1]
            raise CheckpointError(what, todo=f"look for a safetensors version, or {advice}")
        self._weights = SafetensorsCheckpoint(self.location, [TensorFile(folder / WEIGHTS)])
        self.sources = (*self._weights.sources, (folder / CONFIG).absolute())
        self.base_name = str(config.get("base_model_name_or_path") or "")
        self.note = ", a LoRA adapter"
        self.config = config
        self.pairs: dict[str, Pair] = {}
        self._whole: dict[str, str] = {}
        self._read_keys(config)
        self._entries = dict.fromkeys(sorted({*base, *self._whole}))

    def __getitem__(self, name: str) -> Tensor:
        self._entry(name)
        whole = self._weights[self._whole[name]] if name in self._whole else self.base[name]
        if name not in self.pairs:
            return whole
        return torch.add(whole, self._factors(name).dense().view(whole.shape))

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of one tensor."""
        self._entry(name)
        return self._weights.shape(self._whole[name]) if name in self._whole else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of one tensor: at least fp32 where factors are added."""
        self._entry(name)
        stored = self._weights.dtype(self._whole[name]) if name in self._whole else self.base.dtype(name)
        return torch.promote_types(stored, torch.float32) if name in self.pairs else stored

    def factors(self, name: str) -> Factors | None:
        """Returns what the adapter changes in the base's tensor; None where it has a whole tensor of its own."""
        self._entry(name)
        if name in self._whole:
            return None
        return self._factors(name) if name in self.pairs else no_change(self.base.shape(name))

    def changes(self, name: str) -> bool:
        """Whether it has factors or values for the base's tensor."""
        return name in self.pairs or name in self._whole

    def scan(self) -> Scan:
        """Returns a fingerprint of factors and scales, not of the base, and the non-finite counts of the file."""
        scanned = self._weights.scan()
        facts = {pair.a: [pair.scale, pair.turned] for pair in self.pairs.values()}
        text = json.dumps([scanned.fingerprint, facts], sort_keys=True)
        return Scan(hashlib.sha256(text.encode()).hexdigest(), scanned.nonfinite)

    def _stored(self, name: str) -> tuple[str, tuple[int, ...], Iterator[memoryview]]:
        tensor = self[name]
        return FORMAT_NAMES[tensor.dtype], tuple(tensor.shape), byte_chunks(tensor)

    def _factors(self, name: str) -> Factors:
        pair = self.pairs[name]
        if pair.turned:  # (B A)^T = A^T B^T
            return Factors(
                pair.rank, pair.scale, partial(self._matrix, pair.a, True), partial(self._matrix, pair.b, True)
            )
        return Factors(pair.rank, pair.scale, partial(self._matrix, pair.b), partial(self._matrix, pair.a))

    def _matrix(self, key: str, turned: bool = False) -> Tensor:
        tensor = self._weights[key].flatten(1)  # a convolution's factors: (r, in, k, k) and (out, r, 1, 1)
        return tensor.t() if turned else tensor

    def _read_keys(self, config: Mapping[str, Any]) -> None:
        """Sort the file's keys into pairs of factors and whole tensors, by the base's names."""
        modules: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for key in self._weights:
            if not key.startswith(PREFIX):
                raise CheckpointError(
                    f"{self._place} has an unexpected key {quoted(key)}", expected=f"{PREFIX}...", got=key
                )
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            match = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
            if match:
                keys = modules.setdefault(match[1], {})
                if match[2] in keys:
                    raise CheckpointError(f"{self._place} has a factor of {quoted(match[1])} twice", where=key)
                keys[match[2]] = key
            elif "lora_" in name:
                what = f"{self._place} has {quoted(key)}, which is no factor of plain LoRA"
                raise CheckpointError(what, todo="merge this adapter into its base with peft, and use the merged model")
            else:
                whole[name] = key
        for module, keys in modules.items():
            if keys.keys() != {"A", "B"}:
                what = f"{self._place} has one factor of {quoted(module)} only: {listed(keys.values())}"
                raise CheckpointError(what, todo="download the file again")
        names = Renaming(self._place, [f"{module}.weight" for module in modules], self.base)
        for module, keys in modules.items():
            name = names.find(f"{module}.weight", keys["A"])
            if name in self.pairs:
                raise CheckpointError(f"{self._place} has factors of {quoted(name)} twice", where=keys["A"])
            self.pairs[name] = self._pair(module, name, keys, config)
        for own, key in whole.items():
            name = names.find_if_there(own)
            # peft writes a copy of an embedding beside its factors, in case it was resized
            if not (".base_layer." in key and name in self.base and self._is_copy(key, name)):
                self._whole[name] = key
        self._refuse_ambiguous(bool(config.get("fan_in_fan_out")))

    def _is_copy(self, key: str, name: str) -> bool:
        if self._weights.shape(key) != self.base.shape(name):
            return False
        try:
            return torch.equal(self._weights[key], self.base[name])
        except CheckpointError:  # of a base that is not on this machine the headers are known, and copies are the rule
            return True

    def _refuse_ambiguous(self, flag: bool) -> None:
        """The shapes of a square tensor do not tell which way round its factors are, and peft's flag is one for all."""
        plain = {name: pair for name, pair in self.pairs.items() if not pair.embedding}
        square = [name for name in plain if len({*matrix_shape(self.base.shape(name))}) == 1]
        if square and any(pair.turned != flag for name, pair in plain.items() if name not in square):
            raise CheckpointError(
                f"{self._place}: which way round the factors of {quoted(square[0])} are cannot be told",
                expected=f"all factors as fan_in_fan_out={flag} says",
                got="some that are the other way round by their shapes",
                todo="merge this adapter into its base with peft, and use the merged model",
            )

    def _pair(self, module: str, name: str, keys: Mapping[str, str], config: Mapping[str, Any]) -> Pair:
        a, b = self._weights.shape(keys["A"]), self._weights.shape(keys["B"])
        rows, columns = matrix_shape(self.base.shape(name))
        product = (b[0], a[1:].numel()) if len(a) > 1 and len(b) > 1 and b[1:].numel() == a[0] else None
        ways = [turned for turned in (False, True) if product == ((columns, rows) if turned else (rows, columns))]
        if len(self.base.shape(name)) > 2:
            ways = [turned for turned in ways if not turned]  # convolutions are never stored the other way round
        if keys["A"].endswith("lora_embedding_A"):
            ways = [turned for turned in ways if turned]
        if not ways:
            raise CheckpointError(
                f"{self._place} does not belong to this base: the factors of {quoted(name)} have other shapes",
                where=keys["A"],
                expected=f"factors of {tuple(self.base.shape(name))}",
                got=f"A {tuple(a)}, B {tuple(b)}",
                todo=f"use its own base ({quoted(self.base_name)} by name) for the pool, or another adapter",
            )
        rank = by_pattern(config, "rank_pattern", module, config["r"])
        if rank != a[0]:
            what = f"{self._place}: the factors of {quoted(module)} do not have the rank of {CONFIG}"
            raise CheckpointError(what, where=keys["A"], expected=rank, got=a[0], todo="download both files again")
        alpha = by_pattern(config, "alpha_pattern", module, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        turned = ways[0] if len(ways) == 1 else bool(config.get("fan_in_fan_out"))
        return Pair(module, keys["A"], keys["B"], int(a[0]), float(scale), turned)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return os.path.isfile(os.path.join(folder, CONFIG))
