"""Causal language models: every position predicts the next token, with the network's own head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adamerge.backbones.batch import IGNORED
from adamerge.backbones.chat_templates import chat_ids, chat_tokens
from adamerge.backbones.inputs import Inputs, TextPlace
from adamerge.backbones.language_head import LanguageHead
from adamerge.backbones.output import Encoded, Output
from adamerge.backbones.transformers import TransformersBackbone, chosen, text_place
from adamerge.errors import ConfigError, DataError

LONGEST = 512
"""Tokens of a sample where no ``max_length`` is given."""


class CausalLM(TransformersBackbone):
    """A decoder-only language model: GPT-2, Llama, Mistral, Qwen, mixtures of experts.

    A sample is a text; or ``{"prompt", "response"}``; or ``{"messages"}`` for the tokenizer's chat template.

    Args:
        model: folder or Hub id of the base.
        dtype: of the merged copy.
        max_length: samples are cut to so many tokens; by default what the network takes, at most 512.
        response_only: only tokens of responses are to be predicted; else all but the first.

    Raises:
        CheckpointError: the folder is unusable.
        ConfigError: the network does not take ``max_length`` tokens.
    """

    def __init__(
        self, model: str, dtype: str = "float32", max_length: int | None = None, response_only: bool = True
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(model, dtype, AutoModelForCausalLM)
        self.tokenizer = self.load(AutoTokenizer)
        self.max_length, self.response_only = longest(self.network.config, max_length), response_only
        self._head = LanguageHead(self.network, self.network.base_model_prefix)

    def preprocess(self, sample: Any) -> Inputs:
        """Returns token ids, which of them are attended to, and which are to be predicted: each ``(positions,)``.

        Raises:
            DataError: there is nothing to predict, or the sample is of no known form.
        """
        if isinstance(sample, str):
            return token_inputs(self.tokenizer(sample)["input_ids"], None, self.max_length)
        if isinstance(sample, Mapping) and "messages" in sample:
            if not self.response_only:
                return token_inputs(chat_ids(self.tokenizer, sample["messages"]), None, self.max_length)
            ids, predicted = chat_tokens(self.tokenizer, sample["messages"])
        elif isinstance(sample, Mapping) and {"prompt", "response"} <= sample.keys():
            ids, predicted = response_tokens(self.tokenizer, sample["prompt"], sample["response"])
        else:
            raise DataError(
                "a sample of a causal language model is of no known form",
                expected="a text, {prompt, response} or {messages}",
                got=sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__,
            )
        return token_inputs(ids, predicted if self.response_only else None, self.max_length)

    def text_place(self) -> TextPlace:
        """Returns where the tokens and what goes with them are in preprocessed inputs."""
        return text_place(self.tokenizer, ("input_ids", "attention_mask", "predicted"))

    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns last hidden states after the final norm; a position counts when the next token is to be predicted."""
        assert isinstance(inputs, dict)
        attended = inputs["attention_mask"]
        output = self.network.base_model(
            input_ids=inputs["input_ids"],
            attention_mask=attended,
            use_cache=False,
            output_hidden_states=bool(hidden),
        )
        states = chosen(output.hidden_states if hidden else None, hidden)
        return Encoded(output.last_hidden_state, states, shifted(inputs["predicted"]), attended.bool())

    def output(self, encoded: Encoded, task: str) -> Output:
        """Returns logits ``(samples, positions, tokens)`` of the network's own head, the same for all tasks."""
        return Output(self._head(encoded.features), encoded)

    def labels(self, sample: Inputs) -> Tensor:
        """Returns the next token of each position, where that is to be predicted."""
        return next_tokens(sample)


def longest(config: Any, wanted: int | None) -> int:
    """Returns how many tokens a sample may have.

    Raises:
        ConfigError: fewer than 2 are wanted, or more than the network has positions for.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = positions if isinstance(positions, int) and positions > 0 else None
    if wanted is None:
        return min(LONGEST, most or LONGEST)
    if wanted < 2 or (most is not None and wanted > most):
        raise ConfigError(f"backbone.max_length={wanted}", expected=f"2 to {most or 'as many as fit'}", got=wanted)
    return wanted


def shifted(predicted: Tensor) -> Tensor:
    """Returns whether the prediction AT a position counts, from whether the token there is to be predicted."""
    return torch.nn.functional.pad(predicted[..., 1:], (0, 1)).bool()


def next_tokens(sample: Inputs) -> Tensor:
    """Returns labels ``(positions,)`` of one sample of ``input_ids`` and ``predicted``."""
    assert isinstance(sample, dict)
    following = torch.nn.functional.pad(sample["input_ids"][1:], (0, 1)).long()
    return torch.where(shifted(sample["predicted"]), following, IGNORED)


def token_inputs(ids: Sequence[int], predicted: Sequence[bool] | None, most: int) -> dict[str, Tensor]:
    """Returns tensors of one sample, cut to ``most`` tokens; all but the first are predicted where nothing is said.

    Raises:
        DataError: no token is left to predict.
    """
    tokens = torch.tensor(list(ids)[:most], dtype=torch.int64)
    wanted = torch.ones(len(tokens)) if predicted is None else torch.tensor(list(predicted)[:most])
    wanted = wanted.to(torch.int64)
    wanted[:1] = 0  # nothing stands before the first
    if not wanted.any():
        raise DataError(
            f"there is no token to predict in the first {most} of {len(ids)}",
            expected="at least one, and one before it",
            todo="remove the sample, or raise backbone.max_length",
        )
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "predicted": wanted}


def response_tokens(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[bool]]:
    """Returns the tokens of prompt, response and an end mark, each tokenised apart, and which are to be predicted."""
    before = list(tokenizer(prompt)["input_ids"])
    after = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    if not after:
        raise DataError("the response is empty")
    after += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return before + after, [False] * len(before) + [True] * len(after)
