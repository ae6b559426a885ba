"""Networks of the transformers library: loaded by it, and named on disk as it names them, through its own conversions."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion

from adamerge.backbones.base import Backbone, Encoded
from adamerge.backbones.inputs import Inputs
from adamerge.checkpoint import Checkpoint
from adamerge.errors import CheckpointError, ConfigError
from adamerge.files import listed
from adamerge.layout import Layout
from adamerge.sources import local_folder, open_checkpoint

COMPANIONS = (".json", ".txt", ".model", ".jinja", ".py")
"""Endings of the files beside the weights that whoever loads the model needs: configurations, tokenizers, code."""


class TransformersBackbone(Backbone):
    """A network that ``from_pretrained`` loads.

    Args:
        model: folder of the base, a Hub id ``org/name[@revision]``, or ``package:NAME/FOLDER`` inside an installed package.
        dtype: of the merged copy.

    Raises:
        CheckpointError: there is no such model, transformers cannot load it, or weights lack.
    """

    heads_of_experts: Sequence[str] = ()
    """Glob patterns of the tensors that every expert has of its own; the base may lack them."""

    def __init__(self, model: str, dtype: str = "float32") -> None:
        self.model, self.folder = model, local_folder(model)
        self.heads = {}
        self._stored = open_checkpoint(model)
        self.network: Any = self._load(getattr(torch, dtype))
        self.network.eval().requires_grad_(False)
        self._names = self._find_names()

    @property
    @abstractmethod
    def auto(self) -> Any:
        """The ``AutoModel...`` class that loads the network."""

    def tensors(self) -> Mapping[str, Tensor]:
        """On-disk names of the base's own files, to parameters, buffers, and views of parameters that fuse several."""
        found = _unconverted(self.network)
        return {name: found[key] for name, key in self._names.items()}

    def ignores(self, name: str) -> bool:
        """What the base's files hold beside the network's own: second names of tied tensors, old buffers."""
        return name not in self._names

    def trains(self, name: str) -> bool:
        """What the network has a place for."""
        return name in self._names

    def layout(self) -> Layout:
        """The base's own folder, with other weights."""
        copied = tuple(
            sorted(
                path.name
                for path in self.folder.iterdir()
                if path.is_file()
                and path.suffix in COMPANIONS
                and not path.name.endswith(".index.json")
                and not path.name.startswith(".")
            )
        )
        return Layout("model.safetensors", {}, copied, tuple(self.heads_of_experts), self._aliases())

    def _load(self, dtype: torch.dtype) -> Any:
        try:
            with quiet():
                network, found = self.auto.from_pretrained(
                    str(self.folder), dtype=dtype, trust_remote_code=False, output_loading_info=True
                )
        except Exception as error:  # transformers raises errors of every kind
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{self.model}: transformers cannot load it as {self.auto.__name__}: {reason}",
                todo="check that the folder is complete and holds a model of this kind",
            ) from error
        missing = [name for name in found["missing_keys"] if not _matches(name, self.heads_of_experts)]
        if missing or found["mismatched_keys"]:
            raise CheckpointError(
                f"{self.model}: its weights do not fill {type(network).__name__}",
                expected="every tensor",
                got=f"missing: {listed(missing) or 'none'}; other shapes: {listed(map(str, found['mismatched_keys']))}",
                todo="check that config.json belongs to these weights",
            )
        return network

    def _find_names(self) -> dict[str, str]:
        """On-disk name to the name that transformers would save under, one for each storage the base's files fill."""
        found, prefix = _unconverted(self.network), f"{self.network.base_model_prefix}."
        own = {id(tensor) for tensor in (*self.network.parameters(), *self.network.buffers())}
        names: dict[str, str] = {}
        filled: set[tuple[int, int]] = set()
        for name in self._stored:
            known = [key for key in (name, prefix + name, name.removeprefix(prefix)) if key in found]
            if not known or _matches(name, self.heads_of_experts):
                continue
            tensor = found[known[0]]
            if id(tensor) not in own and (tensor._base is None or id(tensor._base) not in own):
                raise CheckpointError(
                    f"{self.model}: transformers rearranges '{name}' when it loads {type(self.network).__name__}",
                    expected="weights that are used as they are stored, split or stacked",
                    got="a permutation, which cannot be refilled in place",
                )
            place = (tensor.data_ptr(), tensor.numel())
            if place not in filled:
                filled.add(place)
                names[name] = known[0]
        return names

    def _aliases(self) -> dict[str, str]:
        """Second names, in the base's files, of storages that another name fills: tied weights that are stored twice."""
        found, prefix = _unconverted(self.network), f"{self.network.base_model_prefix}."
        first = {(found[key].data_ptr(), found[key].numel()): name for name, key in self._names.items()}
        aliases = {}
        for name in self._stored:
            for key in (name, prefix + name, name.removeprefix(prefix)):
                if name not in self._names and key in found and not _matches(name, self.heads_of_experts):
                    aliases[name] = first[found[key].data_ptr(), found[key].numel()]
                    break
        return aliases


class _AsViews(TorchFunctionMode):
    """Leaves what transformers would copy for the sake of its writer as the view that it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return func(*args, **(kwargs or {}))


def _unconverted(network: Any) -> dict[str, Tensor]:
    """The network's parameters and buffers under the names of its files, by transformers' own conversions, reversed."""
    with _AsViews():
        found: dict[str, Tensor] = revert_weight_conversion(network, network.state_dict(keep_vars=True))
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def hidden_states(states: Sequence[Tensor], numbers: Sequence[int]) -> tuple[Tensor, ...]:
    """The hidden states of these numbers.

    Raises:
        ConfigError: there is no such hidden state.
    """
    wrong = [number for number in numbers if not -len(states) <= number < len(states)]
    if wrong:
        raise ConfigError(
            f"there is no hidden state {wrong[0]}", expected=f"0 to {len(states) - 1}, or -1 to -{len(states)}"
        )
    return tuple(states[number] for number in numbers)


def load_companion(auto: Any, folder: Path) -> Any:
    """The tokenizer or processor of a folder.

    Raises:
        CheckpointError: it has none.
    """
    try:
        with quiet():
            return auto.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder}: transformers finds no {auto.__name__.removeprefix('Auto').lower()} there: {reason}",
            todo="copy the files of tokenizer or processor beside the weights",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says while it loads: bars, and layers that are filled in later."""
    level = logging.root.manager.disable
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


class ExpertHead(nn.Module):
    """The part of a network that follows its trunk, with the weights of one expert.

    Args:
        network: the trunk's network, of transformers.
        auto: the class that builds one.
        expert: holds the head's weights, under the names that match ``patterns``.
        patterns: of the head's tensors.

    Raises:
        CheckpointError: the expert has no head, or one that does not fit its configuration.
    """

    def __init__(self, network: Any, auto: Any, expert: Checkpoint, patterns: Sequence[str]) -> None:
        super().__init__()
        weights = {name: expert[name] for name in expert if _matches(name, patterns)}
        if not weights:
            raise CheckpointError(
                f"{expert.location} has no head of its own", expected=f"tensors {list(patterns)}", got="none"
            )
        folder = expert.sources[0].parent if expert.sources else None
        config = network.config
        if folder is not None and (folder / "config.json").is_file():
            config = type(config).from_pretrained(str(folder))
        with torch.device("meta"):
            head = auto.from_config(config)
        setattr(head, head.base_model_prefix, _Trunk())
        head.to_empty(device="cpu")
        fitting, found = head.state_dict(), dict(weights)
        if fitting.keys() != found.keys() or any(fitting[name].shape != found[name].shape for name in found):
            raise CheckpointError(
                f"{expert.location}: its head does not fit its configuration",
                expected={name: tuple(value.shape) for name, value in fitting.items()},
                got={name: tuple(value.shape) for name, value in found.items()},
                todo="copy the expert's config.json beside its weights",
            )
        head.load_state_dict(found)
        self.head = head.to(network.device, network.dtype).eval().requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """What the trunk gives, to logits ``(samples, classes)``."""
        self.head.base_model.given = features
        logits: Tensor = self.head(**{self.head.main_input_name: features}).logits
        del self.head.base_model.given
        return logits


class _Trunk(nn.Module):
    """Stands where the trunk was and hands on what it is given; whether the head wants states or pooled ones."""

    given: Tensor

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return transformers.modeling_outputs.BaseModelOutputWithPooling(self.given, self.given)


def trunk_output(output: Any, hidden: Sequence[int], mask: Tensor | None) -> Encoded:
    """What a head is given: the pooled states where the trunk pools, else all of them."""
    pooled = getattr(output, "pooler_output", None)
    features = output.last_hidden_state if pooled is None else pooled
    states = hidden_states(output.hidden_states, hidden) if hidden else ()
    return Encoded(features, states, hidden_mask=None if mask is None else mask.bool())


def named(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs by name."""
    if isinstance(inputs, Tensor):
        raise TypeError("this network takes inputs by name")
    return inputs
