"""Heads of the experts' own: what stands behind the trunk in each checkpoint, put behind the merged trunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adamerge.backbones.transformers import TransformersBackbone
from adamerge.backbones.zero_shot_head import Task
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import CheckpointError
from adamerge.io.links import refuse_outside
from adamerge.io.model_folder import Layout
from adamerge.io.untrusted_settings import refuse_harmful


class ExpertHeads(TransformersBackbone):
    """A classifier whose trunk is merged and whose heads are read from each expert's checkpoint.

    The head is what the class of the task adds to the bare model, and what the bare model has and the base lacks, as
    BERT's pooler after masked-language pretraining. The network hands on what would enter it.

    Args:
        model: folder or Hub id of the base, with or without a head.
        dtype: of the merged copy.
        loader: transformers' ``AutoModelFor...Classification``.

    Attributes:
        head_modules: names of the submodules that make a head, in the order of computation.

    Raises:
        CheckpointError: the folder is unusable, or the head is more than its modules one after the other.
    """

    head_modules: tuple[str, ...] = ()

    def __init__(self, model: str, dtype: str, loader: Any) -> None:
        self.loader = loader
        super().__init__(model, dtype, loader)
        expected = None if self.outlined else self._probe()
        modules = [self.network.get_submodule(name) for name in self.head_modules]
        for name in self.head_modules:
            parent, _, child = name.rpartition(".")
            setattr(self.network.get_submodule(parent), child, nn.Identity())
        if expected is not None:
            self._compare(nn.Sequential(*modules), expected)
        own = tuple(f"{name}." for name in self.head_modules)
        strangers = self.names.strangers
        self._own = frozenset(name for name in (*self.names.tensors, *self.names.copies) if name.startswith(own))
        self.names = self.names.without(self._own)
        self._foreign = tuple(sorted(strangers))

    def is_head(self, name: str) -> bool:
        """Returns whether a tensor is of some head: in a checkpoint with the trunk's prefix, all that lacks it is."""
        return not name.startswith(f"{self.network.base_model_prefix}.")

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Reads each expert's head from its checkpoint, as the network's class makes it.

        Raises:
            CheckpointError: there is none for a task, or it is not one that the network's class makes.
        """
        self.heads = {}
        for task in tasks:
            if task not in experts:
                raise CheckpointError(
                    f"task '{task}' has no expert, and so no head", expected=f"one of {sorted(experts)}", got=task
                )
            self.heads[task] = self._head(task, tasks[task], experts[task])

    def layout(self) -> Layout:
        """Returns the layout that ``from_pretrained`` reads: the base's files, and the heads' tensors by pattern."""
        patterns = [f"{name}.*" for name in self.head_modules]
        return replace(super().layout(), heads=[*patterns, *self._foreign])

    @torch.no_grad()
    def _compare(self, head: nn.Module, expected: Any) -> None:
        """Checks whether trunk and head, one after the other, make the logits of the whole."""
        if not torch.allclose(head(self._probe()), expected, rtol=1e-2, atol=1e-3):
            raise CheckpointError(
                f"{self.model}: {type(self.network).__name__} does more behind its trunk than its head's modules do",
                expected=f"{list(self.head_modules)}, one after the other",
                got="other logits",
                todo="write a Backbone for this head",
            )

    @torch.no_grad()
    def _probe(self) -> Any:
        """Returns what the network makes of one made-up sample."""
        config = self.network.config
        if self.network.main_input_name == "pixel_values":
            size = getattr(config, "image_size", 32)
            pixels = torch.linspace(-1, 1, 3 * size * size, dtype=self.network.dtype).view(1, 3, size, size)
            return self.network(pixel_values=pixels).logits
        return self.network(input_ids=torch.tensor([[0, 5, 7, 2]]) % config.vocab_size).logits

    def _optional_missing(self, missing: frozenset[str]) -> frozenset[str]:
        """Finds the head's submodules, for which the base needs no values."""
        trunk = self.network.base_model_prefix
        heads = []
        for name, module in getattr(self.network, trunk).named_children():
            names = {f"{trunk}.{name}.{key}" for key in module.state_dict()}
            if names and names <= missing:
                heads.append(f"{trunk}.{name}")
        for name, module in self.network.named_children():
            if name != trunk and module.state_dict():
                heads.append(name)
        self.head_modules = (*heads,)
        return frozenset(name for name in missing if name.startswith(tuple(f"{head}." for head in heads)))

    def _head(self, task: str, words: Task, expert: Checkpoint) -> nn.Module:
        with torch.device("meta"):
            whole = self.loader.from_config(self._config(words, expert))
        modules = []
        for name in self.head_modules:
            module = whole.get_submodule(name)
            try:
                weights = {key: expert[f"{name}.{key}"] for key in module.state_dict()}
                module.load_state_dict(weights, assign=True)
            except (KeyError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[-1].strip()
                raise CheckpointError(
                    f"expert '{task}' has no head that fits: {reason}",
                    where=expert.location,
                    expected=f"tensors '{name}.*' of a {type(whole).__name__}",
                ) from error
            modules.append(module)
        device = next(self.network.parameters()).device
        return nn.Sequential(*modules).to(device, self.computes_in).requires_grad_(False).eval()

    def _config(self, words: Task, expert: Checkpoint) -> Any:
        from transformers import AutoConfig

        folder = expert.sources[0].parent if expert.sources else None
        if folder is not None and (folder / "config.json").is_file():
            refuse_harmful(folder)  # an expert may be named by its file, which says nothing of its neighbours
            refuse_outside(folder / "config.json")
            return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return AutoConfig.from_pretrained(
            str(self.folder), local_files_only=True, trust_remote_code=False, num_labels=len(words.classnames)
        )
