"""Vision-language models: an image, a question, and a response that the language part predicts token by token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adamerge.backbones.batch import IGNORED
from adamerge.backbones.causal import longest, next_tokens, shifted, token_inputs
from adamerge.backbones.chat_templates import chat_spans, within
from adamerge.backbones.inputs import Inputs, packed, pieces
from adamerge.backbones.language_head import LanguageHead
from adamerge.backbones.output import Encoded, Output
from adamerge.backbones.transformers import TransformersBackbone, chosen
from adamerge.errors import CheckpointError, DataError


class VisionLanguage(TransformersBackbone):
    """A vision-language model: LLaVA, Qwen2-VL, InternVL; merge its language part with include patterns of the pool.

    A sample is ``{"image", "question", "response"}``; without a response, the question's tokens are to be predicted.
    Positions of the image are context: they predict nothing, and their hidden states do not count. What the processor
    makes of an image, its pixels, tiles, or patches and their grid, the network is given by the same names.

    Args:
        model: folder or Hub id of the base.
        dtype: of the merged copy.
        max_length: samples are cut to so many tokens, those of the image included.
        response_only: only tokens of responses are to be predicted; else all but the first and the image's.

    Raises:
        CheckpointError: the folder is unusable, or its network none of images and text.
        ConfigError: the network does not take ``max_length`` tokens.
    """

    def __init__(
        self, model: str, dtype: str = "float32", max_length: int | None = None, response_only: bool = True
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        super().__init__(model, dtype, AutoModelForImageTextToText)
        self.processor = self.load(AutoProcessor)
        config = self.network.config
        image_token = getattr(config, "image_token_id", None)
        image_token = getattr(config, "image_token_index", None) if image_token is None else image_token
        marks = [getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
        if image_token is None or marks[0] is None:
            raise CheckpointError(f"{model}: config.json and processor name no image token", got=config.model_type)
        self.image_token: int = image_token
        self._marks = tuple(str(mark) for mark in marks if mark is not None)
        self._accepted = frozenset(inspect.signature(self.network.base_model.forward).parameters)
        self.max_length, self.response_only = longest(config, max_length), response_only
        self._head = LanguageHead(self.network, self.network.base_model_prefix)

    def preprocess(self, sample: Any) -> Inputs:
        """Returns token ids, attention and what is predicted, each ``(positions,)``, and the image's pieces.

        Raises:
            DataError: there is nothing to predict, the image's tokens do not fit into ``max_length``, or the words hold
                what marks an image.
        """
        response = sample.get("response")
        text, turns = self._text(str(sample["question"]), response)
        processed = self.processor(
            images=sample["image"].convert("RGB"),
            text=text,
            return_tensors="pt",
            add_special_tokens=not self.processor.chat_template,
        )
        ids = processed["input_ids"][0]
        is_image = ids == self.image_token
        if not is_image.any() or is_image[self.max_length :].any():
            raise DataError(
                f"{int(is_image.sum())} tokens of the image in {len(ids)}",
                expected=f"at least one, and all in the first {self.max_length}",
                todo="raise backbone.max_length, or make the image smaller",
            )
        predicted = ~is_image
        if self.response_only and response is not None:
            # an image's place is one mark in the text and many tokens behind it, so the response is counted from the end
            first, last = self._from_the_end(text, turns[-1])
            predicted[: len(ids) - first] = False
            predicted[len(ids) - last :] = False
        inputs = token_inputs(ids.tolist(), predicted.tolist(), self.max_length)
        others = {name: value for name, value in processed.items() if name in self._accepted and name not in inputs}
        image = {name: others.pop(name) for name in self.processor.image_processor.model_input_names if name in others}
        return inputs | {name: value[0, : self.max_length] for name, value in others.items()} | pieces(image)

    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns last hidden states after the final norm; positions of text that predict a token count."""
        assert isinstance(inputs, dict)
        given = packed(inputs)
        predicted = given.pop("predicted")
        given = {
            name: value.to(self.computes_in) if value.is_floating_point() else value for name, value in given.items()
        }
        output = self.network.base_model(**given, use_cache=False, output_hidden_states=bool(hidden))
        states = chosen(output.hidden_states if hidden else None, hidden)
        is_text = given["input_ids"] != self.image_token
        attended = given["attention_mask"].bool()
        return Encoded(output.last_hidden_state, states, shifted(predicted) & is_text, attended & is_text)

    def output(self, encoded: Encoded, task: str) -> Output:
        """Returns logits ``(samples, positions, tokens)`` of the network's own head, the same for all tasks."""
        return Output(self._head(encoded.features), encoded)

    def labels(self, sample: Inputs) -> Tensor:
        """Returns the next token of each position, where that is to be predicted."""
        assert isinstance(sample, dict)
        return next_tokens(sample).masked_fill(sample["input_ids"] == self.image_token, IGNORED)

    def _text(self, question: str, response: str | None) -> tuple[str, list[tuple[int, int]]]:
        """Returns the sample as text with one mark for the image, and where the response stands in it."""
        surprising = next((mark for mark in self._marks if mark in f"{question}\n{response}"), None)
        if surprising is not None:
            raise DataError(
                f"the question or response holds '{surprising}', which stands for more than words",
                expected="words alone; the image is put before the question",
                todo="remove it from the data, or from the template over its columns",
            )
        if self.processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages: list[Mapping[str, Any]] = [{"role": "user", "content": content}]
            if response is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
            return chat_spans(self.processor, messages)
        text = f"{self._framed_mark()}\n{question}"
        if response is None:
            return text, []
        whole = f"{text}\n{response}{self.processor.tokenizer.eos_token or ''}"
        return whole, [(len(text) + 1, len(whole))]

    def _framed_mark(self) -> str:
        """Returns the image's mark, between those of its begin and end where the configuration has such."""
        config, words = self.network.config, self.processor.tokenizer.convert_ids_to_tokens
        frame = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
        before, after = ("" if number is None else words(number) for number in frame)
        return f"{before}{self._marks[0]}{after}"

    def _from_the_end(self, text: str, turn: tuple[int, int]) -> tuple[int, int]:
        """Returns how many of the text's last tokens there are from the first inside the turn on, and how many behind it."""
        encoded = self.processor.tokenizer(
            text, add_special_tokens=not self.processor.chat_template, return_offsets_mapping=True
        )
        inside = within(encoded["offset_mapping"], [turn])
        places = [place for place, counted in enumerate(inside) if counted]
        return (len(inside) - places[0], len(inside) - places[-1] - 1) if places else (0, 0)
