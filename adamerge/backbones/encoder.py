"""Text encoders: sequence classifiers with each expert's own head, and sentence encoders with zero-shot heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adamerge.backbones.causal import longest
from adamerge.backbones.expert_heads import ExpertHeads
from adamerge.backbones.inputs import Inputs, TextPlace, moved, stack
from adamerge.backbones.output import Encoded
from adamerge.backbones.transformers import TransformersBackbone, chosen, text_place
from adamerge.backbones.zero_shot_head import Task, ZeroShotHead, class_embeddings
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import DataError


class SequenceClassifier(ExpertHeads):
    """A text classifier: BERT, RoBERTa and their kind; experts may have different numbers of classes.

    A sample is a text, or a mapping of one text or two (sentence and second sentence, in this order).

    Args:
        model: folder or Hub id of the base, with or without a head.
        dtype: of the merged copy.
        max_length: samples are cut to so many tokens; by default what the network takes, at most 512.

    Raises:
        CheckpointError: the folder is unusable.
        ConfigError: the network does not take ``max_length`` tokens.
    """

    def __init__(self, model: str, dtype: str = "float32", max_length: int | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        super().__init__(model, dtype, AutoModelForSequenceClassification)
        self.tokenizer = self.load(AutoTokenizer)
        self.max_length = text_length(self.network.config, self.tokenizer, max_length)

    def preprocess(self, sample: Any) -> Inputs:
        """Returns the tokenizer's tensors of a text or a pair, each ``(positions,)``.

        Raises:
            DataError: the text is empty.
        """
        return text_inputs(self.tokenizer, sample, self.max_length)

    def text_place(self) -> TextPlace:
        """Returns where the tokens and what goes with them are in preprocessed inputs."""
        return text_place(self.tokenizer, self.tokenizer.model_input_names)

    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns the features that enter the head; hidden states count where there is text."""
        inputs = repadded(inputs, self.network.config.pad_token_id)
        output = self.network(**inputs, output_hidden_states=bool(hidden))
        states = chosen(output.hidden_states if hidden else None, hidden)
        return Encoded(output.logits, states, None, inputs["attention_mask"].bool())


class SentenceClassifier(TransformersBackbone):
    """A sentence encoder as a classifier: the embedding nearest to that of a class's name.

    Embeddings are the mean of the last hidden states over the text's positions, normalised.

    Args:
        model: folder or Hub id of the base.
        dtype: of the merged copy.
        scale: of the cosine similarities.
        max_length: samples are cut to so many tokens; by default what the network takes, at most 512.

    Raises:
        CheckpointError: the folder is unusable.
        ConfigError: the network does not take ``max_length`` tokens.

    Reference: Sentence-BERT (Reimers & Gurevych, 2019), https://arxiv.org/abs/1908.10084.
    """

    zero_shot = True

    def __init__(self, model: str, dtype: str = "float32", scale: float = 20.0, max_length: int | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__(model, dtype, AutoModel)
        self.tokenizer, self.scale = self.load(AutoTokenizer), scale
        self.max_length = text_length(self.network.config, self.tokenizer, max_length)

    def trains(self, name: str) -> bool:
        """Returns True for all but the pooler, which the mean of hidden states does not use."""
        return super().trains(name) and not name.startswith("pooler.")

    def _optional_missing(self, missing: frozenset[str]) -> frozenset[str]:
        """Returns the pooler's: an encoder is as good without it."""
        return frozenset(name for name in missing if name.startswith("pooler."))

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Embeds every prompt once; experts have no heads of their own."""
        self.heads = {
            name: ZeroShotHead(self.scale * class_embeddings(name, task, self._embed)) for name, task in tasks.items()
        }

    def preprocess(self, sample: Any) -> Inputs:
        """Returns the tokenizer's tensors of a text or a pair, each ``(positions,)``.

        Raises:
            DataError: the text is empty.
        """
        return text_inputs(self.tokenizer, sample, self.max_length)

    def text_place(self) -> TextPlace:
        """Returns where the tokens and what goes with them are in preprocessed inputs."""
        return text_place(self.tokenizer, self.tokenizer.model_input_names)

    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns the mean of the last hidden states over the text, ``(samples, width)``, not normalised."""
        inputs = repadded(inputs, self.network.config.pad_token_id)
        output = self.network(**inputs, output_hidden_states=bool(hidden))
        attended = inputs["attention_mask"].bool()
        states = torch.where(attended[:, :, None], output.last_hidden_state, 0.0)
        mean = states.sum(dim=1) / attended.sum(dim=1, keepdim=True)
        return Encoded(mean, chosen(output.hidden_states if hidden else None, hidden), None, attended)

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        inputs = stack([self.preprocess(prompt) for prompt in prompts])
        return self.encode(moved(inputs, next(self.network.parameters()).device)).features


def text_length(config: Any, tokenizer: Any, wanted: int | None) -> int:
    """Returns how many tokens a text may have, special ones included.

    Raises:
        ConfigError: more are wanted than the network has positions for.
    """
    # RoBERTa's table has more rows than the tokenizer may use: positions begin behind the padding's
    return longest(config, wanted) if wanted is not None else min(longest(config, None), tokenizer.model_max_length)


def text_inputs(tokenizer: Any, sample: Any, most: int) -> dict[str, Tensor]:
    """Returns the tokenizer's tensors of one text, or of a mapping of one or two, each ``(positions,)``.

    Raises:
        DataError: it is empty, or of no known form.
    """
    texts = [sample] if isinstance(sample, str) else list(sample.values() if isinstance(sample, Mapping) else sample)
    if not (1 <= len(texts) <= 2 and all(isinstance(text, str) for text in texts)):
        raise DataError("a sample of a text encoder is of no known form", expected="one text or two", got=texts)
    tokenized = tokenizer(*texts, truncation=True, max_length=most)
    if len(tokenized["input_ids"]) <= tokenizer.num_special_tokens_to_add(pair=len(texts) == 2):
        raise DataError("the text is empty", todo="remove the sample")
    return {name: torch.tensor(values) for name, values in tokenized.items()}


def repadded(inputs: Inputs, padding: int | None) -> dict[str, Tensor]:
    """Returns text inputs with the network's own padding id where there is no text; batches are padded with zeros."""
    assert isinstance(inputs, dict)
    if not padding:
        return inputs
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, padding)
    return inputs | {"input_ids": ids}
