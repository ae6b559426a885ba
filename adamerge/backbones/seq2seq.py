"""Encoder-decoder language models: the target's tokens are predicted one by one from the text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adamerge.backbones.batch import IGNORED
from adamerge.backbones.causal import LONGEST
from adamerge.backbones.inputs import Inputs, TextPlace
from adamerge.backbones.language_head import LanguageHead
from adamerge.backbones.output import Encoded, Output
from adamerge.backbones.transformers import TransformersBackbone, chosen, text_place
from adamerge.errors import ConfigError, DataError

_OF_TEXT = re.compile(r"(^|\.)encoder\.|(EncDecAttention|encoder_attn)\.[kv]")
"""Names of weights whose inputs are made of the text alone, T5's and BART's."""


class Seq2Seq(TransformersBackbone):
    """An encoder-decoder language model: T5, Flan-T5.

    A sample is ``{"prompt", "response"}``; without a response, or as a mere text, only the first token is predicted. Hidden
    states are the decoder's.

    Args:
        model: folder or Hub id of the base.
        dtype: of the merged copy.
        max_length: texts are cut to so many tokens.
        max_target_length: targets are cut to so many tokens.

    Raises:
        CheckpointError: the folder is unusable.
        ConfigError: a length is below 1.
    """

    def __init__(
        self, model: str, dtype: str = "float32", max_length: int = LONGEST, max_target_length: int = 128
    ) -> None:
        if min(max_length, max_target_length) < 1:
            raise ConfigError(
                f"backbone: max_length {max_length} and max_target_length {max_target_length} must be >= 1"
            )
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        super().__init__(model, dtype, AutoModelForSeq2SeqLM)
        self.tokenizer = self.load(AutoTokenizer)
        self.max_length, self.max_target_length = max_length, max_target_length
        self._head = LanguageHead(self.network, "decoder")

    def preprocess(self, sample: Any) -> Inputs:
        """Returns ids and attention of the text ``(positions,)``, and start token and target ``(n + 1,)``, n predicted.

        Raises:
            DataError: text or target is empty.
        """
        text, target = (sample, None) if isinstance(sample, str) else (sample["prompt"], sample.get("response"))
        special = self.tokenizer.num_special_tokens_to_add()
        ids = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        if len(ids) <= special:
            raise DataError("the text is empty", todo="remove the sample")
        tokens = [self.network.config.decoder_start_token_id]
        predicting = 1
        if target is not None:
            answer = self.tokenizer(text_target=target, truncation=True, max_length=self.max_target_length)["input_ids"]
            if len(answer) <= special:
                raise DataError("the target is empty", todo="remove the sample, or leave its target out")
            tokens, predicting = tokens + list(answer), len(answer)
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "decoder_input_ids": torch.tensor(tokens),
            "decoder_attention_mask": (torch.arange(len(tokens)) < predicting).long(),
        }

    def text_place(self) -> TextPlace:
        """Returns where the encoder's text and what goes with it are in preprocessed inputs."""
        return text_place(self.tokenizer, ("input_ids", "attention_mask"))

    def attended(self, inputs: Inputs, weight: str) -> tuple[Tensor, ...]:
        """Returns the masks of the text and of the target; the decoder's keys and values of the text are the text's."""
        assert isinstance(inputs, dict)
        text, target = inputs["attention_mask"].bool(), inputs["decoder_attention_mask"].bool()
        return (text, target) if _OF_TEXT.search(weight) else (target, text)

    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns the decoder's last hidden states; the positions of start token and target, without its end, count."""
        assert isinstance(inputs, dict)
        network = self.network
        encoded = network.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        # padding stands behind what counts, which a causal decoder does not see
        output = network.get_decoder()(
            input_ids=inputs["decoder_input_ids"],
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=inputs["attention_mask"],
            use_cache=False,
            output_hidden_states=bool(hidden),
        )
        counted = inputs["decoder_attention_mask"].bool()
        states = chosen(output.hidden_states if hidden else None, hidden)
        return Encoded(output.last_hidden_state, states, counted, counted)

    def output(self, encoded: Encoded, task: str) -> Output:
        """Returns logits ``(samples, positions, tokens)`` of the network's own head, the same for all tasks."""
        return Output(self._head(encoded.features, encoder_outputs=(encoded.features,)), encoded)

    def labels(self, sample: Inputs) -> Tensor:
        """Returns the target's tokens, at the positions that predict them."""
        assert isinstance(sample, Mapping)
        following = torch.nn.functional.pad(sample["decoder_input_ids"][1:], (0, 1))
        has_next = torch.arange(len(following)) < len(following) - 1
        return torch.where(sample["decoder_attention_mask"].bool() & has_next, following, IGNORED)
