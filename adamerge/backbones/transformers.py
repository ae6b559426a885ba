"""The part that all transformers backbones share: loading, on-disk names, hidden states, the exported folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.backbones.base import Backbone
from adamerge.backbones.hidden_states import state_number
from adamerge.backbones.inputs import TextPlace
from adamerge.backbones.name_map import names_of
from adamerge.backbones.zero_shot_head import Task
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.obsolete_tensors import is_leftover
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError, ConfigError
from adamerge.io.dtypes import torch_dtype
from adamerge.io.links import refuse_links_outside
from adamerge.io.model_folder import Layout

TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.model", "*.tiktoken"),
)
COPIED = (
    *("config.json", "generation_config.json", "*processor_config.json", "chat_template.*", "*.jinja", "*.py"),
    *TOKENIZER_FILES,
)
"""Files of a model's folder that describe it and its inputs."""

_OUTLINED = ContextVar("outlined", default=False)


@contextmanager
def outlined() -> Iterator[None]:
    """Makes networks that are built inside have names and shapes, and no weights: for merges that none of them runs."""
    before = _OUTLINED.set(True)
    try:
        yield
    finally:
        _OUTLINED.reset(before)


class TransformersBackbone(Backbone):
    """A network that transformers loads from a folder or the Hub.

    Args:
        model: folder or Hub id (``org/name[@revision]``) of the base.
        dtype: of the merged copy.
        loader: transformers' ``AutoModelFor...`` class of the task.

    Attributes:
        folder: where the base's files are on this machine.
        missing: parameters of the network that the base has no values for.

    Raises:
        CheckpointError: the folder is unusable, or its tensors are not the network's.
        ConfigError: there is no such dtype.
    """

    network: Any

    def __init__(self, model: str, dtype: str, loader: Any) -> None:
        torch_dtype(dtype, "backbone")
        self.model, self.dtype = model, dtype
        if Path(model).expanduser().is_file():
            raise CheckpointError(f"'{model}' is a file", expected="the model's folder, with its config.json")
        checkpoint = open_checkpoint(model)
        self.folder = checkpoint.sources[0].parent
        refuse_links_outside(self.folder)
        self.outlined = _OUTLINED.get()
        place = {"device_map": "meta"} if self.outlined else {}
        self.network, information = self.load(loader, dtype=self.computes_in, output_loading_info=True, **place)
        self.network.eval()
        self.heads = {}
        missing = frozenset(information["missing_keys"])
        self.missing = missing - self._optional_missing(missing)
        self.names = names_of(self.network, checkpoint)
        self._check({name for name in information["unexpected_keys"] if not _is_leftover(name, checkpoint)})

    @property
    def computes_in(self) -> torch.dtype:
        """Returns the dtype of the weights while they run; a sharded network's parameters have another in between."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def load(self, loader: Any, **arguments: Any) -> Any:
        """Calls ``loader.from_pretrained`` on the base's files; runs no code of theirs, opens no connection.

        Raises:
            CheckpointError: it cannot.
        """
        try:
            return loader.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False, **arguments)
        except Exception as error:  # the library raises what its parts raise: OSError, ValueError, KeyError, Rust's own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{self.model}: transformers' {loader.__name__} cannot load it: {reason}") from error

    def is_head(self, name: str) -> bool:
        """Returns whether a tensor of the base's that the network has no place for is the head of another task."""
        return False

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns tensors named as in the base's file; pieces of fused parameters are views, a tie counts once."""
        return names_of(self.network, (*self.names.tensors,)).tensors

    def ignores(self, name: str) -> bool:
        """Returns whether a name is a tie's second copy, or a tensor that the network computes without."""
        return name in self.names.copies or name in self.names.strangers

    def trains(self, name: str) -> bool:
        """Returns whether the network has a place for the tensor."""
        return name in self.names.tensors

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Makes no heads: the network predicts by itself."""

    def layout(self) -> Layout:
        """Returns the layout that ``from_pretrained`` reads; files are the base's own."""
        copied = files_of(self.folder, COPIED)
        wide = [
            name
            for name, tensor in self.tensors().items()
            if tensor.is_floating_point() and tensor.dtype.itemsize > self.computes_in.itemsize
        ]
        return Layout(copied=copied, copies=self.names.copies, wide=wide)

    def _optional_missing(self, missing: frozenset[str]) -> frozenset[str]:
        """Returns the parameters whose values come from elsewhere than the base: the heads of tasks."""
        return frozenset()

    def _check(self, unexpected: set[str]) -> None:
        surprising = {name for name in unexpected if not self.is_head(name)}
        if self.missing or surprising:
            name = sorted(self.missing or surprising)[0]
            raise CheckpointError(
                f"base {self.model} {'lacks' if self.missing else 'has unexpected'} '{name}'",
                expected=f"the tensors of {type(self.network).__name__}",
                got=f"{len(self.missing)} missing, {len(surprising)} unexpected",
                todo="check that config.json belongs to these weights, and the backbone to this kind of model",
            )


def text_place(tokenizer: Any, along: Sequence[str]) -> TextPlace:
    """Returns where the text is in inputs that have a tokenizer's ids.

    Args:
        tokenizer: transformers'.
        along: names of all tensors that have an entry for each token.
    """
    return TextPlace(tuple(along), tuple(sorted(set(tokenizer.all_special_ids))), tokenizer.mask_token_id)


def files_of(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Returns the names of a folder's files that match one of the patterns, weights and their indexes left out."""
    return [
        name
        for name in sorted(os.listdir(folder))
        if (folder / name).is_file()
        and any(fnmatchcase(name, pattern) for pattern in patterns)
        and not name.endswith((".safetensors", ".index.json"))
    ]


def _is_leftover(name: str, base: Checkpoint) -> bool:
    return name in base and is_leftover(name, base.shape(name))


def chosen(states: Sequence[Tensor] | None, numbers: Sequence[float]) -> tuple[Tensor, ...]:
    """Returns hidden states by number: 0 is what enters the first block, the last what leaves the final norm.

    Args:
        states: of all numbers, each ``(samples, positions, width)`` or ``(samples, channels, height, width)``.
        numbers: as ``state_number`` reads them.

    Returns:
        each ``(samples, positions, width)``.

    Raises:
        ConfigError: there is no such hidden state.
    """
    if not numbers:
        return ()
    if states is None:
        raise ConfigError("this network gives no hidden states to align")
    picked = [states[state_number(number, len(states))] for number in numbers]
    return tuple(state.flatten(2).transpose(1, 2) if state.ndim == 4 else state for state in picked)
