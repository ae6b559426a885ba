"""Text encoders of transformers as classifiers: with each expert's own head, or with heads made of class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from adamerge.backbones.base import Encoded, Task
from adamerge.backbones.inputs import Inputs, stack
from adamerge.backbones.transformers import (
    ExpertHead,
    TransformersBackbone,
    hidden_states,
    load_companion,
    named,
    trunk_output,
)
from adamerge.backbones.zero_shot import ZeroShotHead, class_prompts
from adamerge.checkpoint import Checkpoint
from adamerge.errors import DataError


class TextEncoder(TransformersBackbone):
    """What encoders share: a text, or a pair ``{"text", "pair"}``, to token ids."""

    def __init__(self, model: str, dtype: str = "float32", max_length: int = 128) -> None:
        super().__init__(model, dtype)
        self.max_length = max_length
        self.tokenizer: Any = load_companion(transformers.AutoTokenizer, self.folder)

    def preprocess(self, sample: Any) -> dict[str, Tensor]:
        """Token ids, cut to ``max_length``."""
        words = (sample,) if isinstance(sample, str) else (sample["text"], sample["pair"])
        found = self.tokenizer(*words, truncation=True, max_length=self.max_length)
        if not any(str(word).strip() for word in words):
            raise DataError("the text is empty", todo="remove the row")
        return {name: torch.tensor(value) for name, value in found.items()}


class SequenceClassifier(TextEncoder):
    """An encoder whose experts bring classification heads of their own: BERT, RoBERTa and others; the trunk is merged.

    The heads are neither merged nor trained: each expert's stays its task's. The base may lack one, as pretrained
    models do; exclude what it has instead, such as ``lm_head.*``.

    Args:
        model: folder of the base, a Hub id, or ``package:NAME/FOLDER``.
        dtype: of the merged copy.
        max_length: tokens of a text or pair; the rest is cut off.
        head: glob patterns of the head's tensors.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self, model: str, dtype: str = "float32", max_length: int = 128, head: Sequence[str] = ("classifier.*",)
    ) -> None:
        self.heads_of_experts = tuple(head)
        super().__init__(model, dtype, max_length)

    @property
    def auto(self) -> Any:
        """Any encoder with a classification head."""
        return transformers.AutoModelForSequenceClassification

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Each task's expert's."""
        self.heads = {
            task: ExpertHead(self.network, self.auto, experts[task], self.heads_of_experts)
            for task in tasks
            if task in experts
        }

    def encode(self, inputs: Inputs, hidden: Sequence[int] = ()) -> Encoded:
        """Token ids to what the head is given: pooled states, or all of them."""
        given = named(inputs)
        output = self.network.base_model(**given, output_hidden_states=bool(hidden))
        return trunk_output(output, hidden, given["attention_mask"])


class SentenceClassifier(TextEncoder):
    """A sentence encoder with zero-shot heads: cosine similarity to the embeddings of the class names, as with CLIP.

    An embedding is the mean of the last hidden states over the text's tokens, normalised. Heads are made by the base.

    Args:
        model: folder of the base, a Hub id, or ``package:NAME/FOLDER``.
        dtype: of the merged copy.
        max_length: tokens of a text; the rest is cut off.
        scale: by which similarities are multiplied; sentence encoders have none of their own.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.

    Reference: Sentence-BERT (Reimers and Gurevych, 2019), https://arxiv.org/abs/1908.10084.
    """

    def __init__(self, model: str, dtype: str = "float32", max_length: int = 128, scale: float = 20.0) -> None:
        super().__init__(model, dtype, max_length)
        self.scale = scale

    @property
    def auto(self) -> Any:
        """Any encoder."""
        return transformers.AutoModel

    def trains(self, name: str) -> bool:
        """All but the pooler, which embeddings do not use."""
        return super().trains(name) and not name.startswith("pooler.")

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Encode every prompt once; experts have no heads of their own."""
        self.heads = {name: ZeroShotHead(self._class_embeddings(name, task)) for name, task in tasks.items()}

    def encode(self, inputs: Inputs, hidden: Sequence[int] = ()) -> Encoded:
        """Token ids to embeddings ``(samples, width)``, not normalised."""
        given = named(inputs)
        output = self.network(**given, output_hidden_states=bool(hidden))
        mask = given["attention_mask"].bool()
        weights = mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
        embeddings = (output.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
        states = hidden_states(output.hidden_states, hidden) if hidden else ()
        return Encoded(embeddings, states, hidden_mask=mask)

    @torch.no_grad()
    def _class_embeddings(self, name: str, task: Task) -> Tensor:
        prompts = class_prompts(name, task)
        device = self.network.device
        found = []
        for first in range(0, len(prompts), 64):
            batch = named(stack([self.preprocess(prompt) for prompt in prompts[first : first + 64]]))
            found.append(self.encode({key: value.to(device) for key, value in batch.items()}).features.float())
        embeddings = nn.functional.normalize(torch.cat(found), dim=-1)
        means = embeddings.view(len(task.classnames), len(task.templates), -1).mean(dim=1)
        return self.scale * nn.functional.normalize(means, dim=-1)
