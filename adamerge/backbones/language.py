"""Language models of transformers: causal, sequence to sequence, and with images; every position predicts a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from adamerge.backbones.base import IGNORED, Encoded, Output, Task
from adamerge.backbones.inputs import Inputs
from adamerge.backbones.transformers import TransformersBackbone, hidden_states, load_companion, named
from adamerge.checkpoint import Checkpoint
from adamerge.errors import DataError


class LanguageModel(TransformersBackbone):
    """A network that predicts tokens by itself: its logits are the library's own, whatever it does to them.

    Inputs are ``input_ids``, ``attention_mask`` and ``predicted``: 1 where the prediction of the next token counts.
    """

    def __init__(self, model: str, dtype: str = "float32", max_length: int = 1024) -> None:
        super().__init__(model, dtype)
        self.max_length = max_length
        self.tokenizer: Any = load_companion(transformers.AutoTokenizer, self.folder)

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """There are none: the network predicts by itself."""

    def encode(self, inputs: Inputs, hidden: Sequence[int] = ()) -> Encoded:
        """Token ids to logits ``(samples, positions, vocabulary)``, which stand for features, and hidden states."""
        given = dict(named(inputs))
        mask = given.pop("predicted").bool()
        output = self.network(**given, output_hidden_states=bool(hidden), use_cache=False)
        states = hidden_states(self.states(output), hidden) if hidden else ()
        return Encoded(output.logits, states, mask, self.attended(given))

    def states(self, output: Any) -> Sequence[Tensor]:
        """The hidden states of the positions that predict."""
        found: Sequence[Tensor] = output.hidden_states
        return found

    def attended(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Bool ``(samples, positions)``: the positions whose hidden states count."""
        return inputs["attention_mask"].bool()

    def output(self, encoded: Encoded, task: str) -> Output:
        """The logits as they are."""
        return Output(encoded.features, encoded)

    def labels(self, sample: Inputs) -> Tensor:
        """The next token where it counts."""
        given = named(sample)
        following = torch.cat([given["input_ids"][1:], torch.tensor([IGNORED])])
        return torch.where(given["predicted"].bool(), following, IGNORED)

    def counted(self, ids: Sequence[int], counts: Sequence[bool]) -> dict[str, Tensor]:
        """Inputs of one text, cut to ``max_length``.

        Args:
            ids: its tokens.
            counts: which of them should be predicted.

        Raises:
            DataError: no token can be predicted.
        """
        ids, counts = list(ids)[: self.max_length], list(counts)[: self.max_length]
        predicted = [*counts[1:], False]
        if not any(predicted):
            raise DataError(
                "the text has no token to predict",
                expected=f"at least one after the first, within {self.max_length} tokens",
                got=f"{len(ids)} tokens",
                todo="remove the row, or raise max_length",
            )
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.long),
            "predicted": torch.tensor(predicted, dtype=torch.long),
        }


class CausalLM(LanguageModel):
    """A causal language model: GPT-2, Llama, Mistral, Qwen2, Qwen3-MoE, and others that ``AutoModelForCausalLM`` loads.

    A sample is a text, ``{"prompt", "response"}``, or a chat, a list of ``{"role", "content"}``. Of a text all tokens count,
    of the others those of the response or of the assistant's turns, and the token that ends them.

    Args:
        model: folder of the base, a Hub id, or ``package:NAME/FOLDER``.
        dtype: of the merged copy.
        max_length: tokens of a sample; the rest is cut off.
        response_only: False lets all tokens count, prompts too.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
    """

    def __init__(self, model: str, dtype: str = "float32", max_length: int = 1024, response_only: bool = True) -> None:
        super().__init__(model, dtype, max_length)
        self.response_only = response_only

    @property
    def auto(self) -> Any:
        """Any causal model."""
        return transformers.AutoModelForCausalLM

    def preprocess(self, sample: Any) -> dict[str, Tensor]:
        """A text, a prompt with its response, or a chat, to token ids and which predictions count."""
        if isinstance(sample, str):
            ids = self.tokenizer(sample)["input_ids"]
            return self.counted(ids, [True] * len(ids))
        if isinstance(sample, Mapping):
            prompt = self.tokenizer(sample["prompt"])["input_ids"]
            response = self.tokenizer(sample["response"] or "", add_special_tokens=False)["input_ids"]
            end = [] if self.tokenizer.eos_token_id is None or not response else [self.tokenizer.eos_token_id]
            ids = [*prompt, *response, *end]
            everything = not self.response_only or not response
            return self.counted(ids, [everything] * len(prompt) + [True] * (len(ids) - len(prompt)))
        return self.counted(*self._chat(sample))

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        """Tokens of a chat by the tokenizer's template, and which are the assistant's: what each turn of it adds."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError("the tokenizer has no chat template, and the sample is a chat", where=self.folder)
        ids: list[int] = []
        counts: list[bool] = []
        for last, message in enumerate(messages, 1):
            if message["role"] == "assistant":
                asked = self._template(messages[: last - 1], True)
                counts += [not self.response_only] * (len(asked) - len(ids))
                ids = self._template(messages[:last], False)
                counts += [True] * (len(ids) - len(counts))
        rest = self._template(messages, False)
        return rest, counts + [not self.response_only] * (len(rest) - len(counts))

    def _template(self, messages: Sequence[Mapping[str, str]], asks: bool) -> list[int]:
        found = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=asks, tokenize=True, return_dict=True
        )
        return list(found["input_ids"])


class Seq2Seq(LanguageModel):
    """An encoder-decoder: T5 and others that ``AutoModelForSeq2SeqLM`` loads.

    A sample is ``{"prompt", "response"}``: the encoder reads the prompt, and the decoder predicts the response from its start
    token on. Without a response the decoder sees its start token alone, and its first prediction counts.

    Args:
        model: folder of the base, a Hub id, or ``package:NAME/FOLDER``.
        dtype: of the merged copy.
        max_length: tokens of a prompt, and of a response; the rest is cut off.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
    """

    @property
    def auto(self) -> Any:
        """Any encoder-decoder."""
        return transformers.AutoModelForSeq2SeqLM

    def preprocess(self, sample: Any) -> dict[str, Tensor]:
        """A prompt with its response to the encoder's and the decoder's token ids."""
        prompt, response = (sample, "") if isinstance(sample, str) else (sample["prompt"], sample.get("response") or "")
        ids = self.tokenizer(prompt)["input_ids"][: self.max_length]
        if not ids:
            raise DataError("the prompt has no tokens", todo="remove the row")
        config = self.network.config
        start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id
        target = self.tokenizer(response, add_special_tokens=False)["input_ids"][: self.max_length - 1]
        decoder = [start, *target]  # each position predicts the next one of target, the last the end
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.long),
            "decoder_input_ids": torch.tensor(decoder),
            "predicted": torch.ones(len(decoder), dtype=torch.long),
        }

    def states(self, output: Any) -> Sequence[Tensor]:
        """Those of the decoder."""
        found: Sequence[Tensor] = output.decoder_hidden_states
        return found

    def encode(self, inputs: Inputs, hidden: Sequence[int] = ()) -> Encoded:
        """Token ids to logits ``(samples, positions, vocabulary)`` of the decoder, and its hidden states."""
        encoded = super().encode(inputs, hidden)
        return Encoded(encoded.features, encoded.hidden, encoded.mask, encoded.mask)

    def labels(self, sample: Inputs) -> Tensor:
        """The response, and the token that ends it."""
        decoder = named(sample)["decoder_input_ids"]
        return torch.cat([decoder[1:], torch.tensor([self.network.config.eos_token_id])])


class VisionLanguage(LanguageModel):
    """A language model that sees: LLaVA and others that ``AutoModelForImageTextToText`` loads.

    A sample is ``{"image", "question", "response"}``. The response counts, or the question where there is none; the positions
    of the image never do.

    Args:
        model: folder of the base, a Hub id, or ``package:NAME/FOLDER``.
        dtype: of the merged copy.
        max_length: tokens of a sample, those of the image among them; longer ones are refused.
        response_only: False lets the question count too.

    Raises:
        CheckpointError: the model or its processor cannot be loaded.
    """

    def __init__(self, model: str, dtype: str = "float32", max_length: int = 4096, response_only: bool = True) -> None:
        super().__init__(model, dtype, max_length)
        self.response_only = response_only
        self.processor: Any = load_companion(transformers.AutoProcessor, self.folder)

    @property
    def auto(self) -> Any:
        """Any language model that takes images."""
        return transformers.AutoModelForImageTextToText

    def preprocess(self, sample: Any) -> dict[str, Tensor]:
        """An image, a question and a response to token ids, pixels, and which predictions count."""
        image, response = sample["image"].convert("RGB"), sample.get("response") or ""
        asked = self._inputs(self._words(sample["question"]), image)
        ids = asked["input_ids"][0].tolist()
        answer = self.tokenizer(response, add_special_tokens=False)["input_ids"] if response else []
        end = [self.tokenizer.eos_token_id] if answer and self.tokenizer.eos_token_id is not None else []
        seen = [number == self.network.config.image_token_id for number in ids]
        everything = not self.response_only or not answer
        if len(ids) + len(answer) > self.max_length:
            raise DataError(
                "image and text have too many tokens",
                expected=f"at most max_length={self.max_length}",
                got=len(ids) + len(answer),
            )
        found = self.counted(
            [*ids, *answer, *end], [everything and not image for image in seen] + [True] * len(answer + end)
        )
        rest = {name: value[0] for name, value in asked.items() if name not in {"input_ids", "attention_mask"}}
        return found | {name: value for name, value in rest.items() if isinstance(value, Tensor)}

    def attended(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Text alone: neither padding nor image."""
        return inputs["attention_mask"].bool() & (inputs["input_ids"] != self.network.config.image_token_id)

    def _words(self, question: str) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text: str = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            return text
        return f"{self.processor.image_token}\n{question}"

    def _inputs(self, text: str, image: Any) -> dict[str, Tensor]:
        return dict(self.processor(text=text, images=image, return_tensors="pt"))
