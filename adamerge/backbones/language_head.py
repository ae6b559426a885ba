"""The way from a language model's last hidden states to its logits, by the network's own code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LanguageHead(nn.Module):
    """The network without its trunk: whatever its ``forward`` does after it (scale, project, cap) is done here too.

    Args:
        network: a transformers language model; its parameters are shared.
        trunks: names of the submodules whose work is done already.
    """

    def __init__(self, network: Any, *trunks: str) -> None:
        super().__init__()
        rest = network.__class__.__new__(network.__class__)
        rest.__dict__ |= network.__dict__
        # the twin gets submodules of its own, so that only its trunk is missing
        rest.__dict__["_modules"] = dict(network._modules) | {name: _Done() for name in trunks}
        self.rest = rest

    def forward(self, features: Tensor, **arguments: Any) -> Tensor:
        """Returns logits ``(samples, positions, tokens)`` of features ``(samples, positions, width)``."""
        logits: Tensor = self.rest(**arguments, **{self.argument: features}, use_cache=False).logits
        return logits

    @property
    def argument(self) -> str:
        """Returns the name of the argument that stands for what the trunk would have made."""
        return "decoder_inputs_embeds" if self.rest.config.is_encoder_decoder else "inputs_embeds"


class _Done(nn.Module):
    """Hands on what it is given as embeddings, as if it had come out of the last layer."""

    def forward(self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> _Passed:
        return _Passed(inputs_embeds)


class _Passed:
    """The output of a trunk of which only the last hidden states are known."""

    def __init__(self, last_hidden_state: Tensor | None) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
