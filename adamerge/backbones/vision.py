"""Image networks of transformers: classifiers with each expert's own head, and CLIP with heads made of class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from adamerge.backbones.base import Encoded, Task
from adamerge.backbones.inputs import Inputs
from adamerge.backbones.transformers import (
    ExpertHead,
    TransformersBackbone,
    hidden_states,
    load_companion,
    trunk_output,
)
from adamerge.backbones.zero_shot import ZeroShotHead, class_prompts
from adamerge.checkpoint import Checkpoint


class ImageNetwork(TransformersBackbone):
    """What networks of images share: a PIL image to pixels, uint8 where the normalisation can wait for the device."""

    def __init__(self, model: str, dtype: str = "float32") -> None:
        super().__init__(model, dtype)
        processor = load_companion(transformers.AutoImageProcessor, self.folder)
        self.processor: Any = processor
        self._late = bool(getattr(processor, "do_rescale", False) and getattr(processor, "do_normalize", False))
        if self._late:
            self._factor = float(processor.rescale_factor)
            self._mean = torch.tensor(processor.image_mean).view(-1, 1, 1)
            self._std = torch.tensor(processor.image_std).view(-1, 1, 1)

    def preprocess(self, sample: Any) -> Tensor:
        """A PIL image to ``(3, height, width)``: all that the processor does, up to rescaling and normalisation."""
        later = {"do_rescale": False, "do_normalize": False} if self._late else {}
        pixels: Tensor = self.processor(sample.convert("RGB"), return_tensors="pt", **later)["pixel_values"][0]
        return pixels.round().clamp(0, 255).to(torch.uint8) if self._late else pixels

    def normalise(self, inputs: Tensor) -> Tensor:
        """Preprocessed ``(samples, 3, height, width)`` to the pixels that the processor itself gives, in fp32."""
        if not self._late:
            return inputs
        if self._mean.device != inputs.device:
            self._mean, self._std = self._mean.to(inputs.device), self._std.to(inputs.device)
        return (inputs.to(torch.float32) * self._factor - self._mean) / self._std

    def pixels(self, inputs: Inputs) -> Tensor:
        """Normalised pixels in the network's dtype."""
        assert isinstance(inputs, Tensor)
        return self.normalise(inputs).to(self.network.dtype)


class ImageClassifier(ImageNetwork):
    """An image network whose experts bring classification heads of their own: ViT, ResNet and others; the trunk is merged.

    Buffers such as the running statistics of batch normalisation stay the base's: exclude them (``*.running_mean``,
    ``*.running_var``).

    Args:
        model: folder of the base, a Hub id, or ``package:NAME/FOLDER``.
        dtype: of the merged copy.
        head: glob patterns of the head's tensors.

    Raises:
        CheckpointError: the model or its image processor cannot be loaded.
    """

    def __init__(self, model: str, dtype: str = "float32", head: Sequence[str] = ("classifier.*",)) -> None:
        self.heads_of_experts = tuple(head)
        super().__init__(model, dtype)

    @property
    def auto(self) -> Any:
        """Any image network with a classification head."""
        return transformers.AutoModelForImageClassification

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Each task's expert's."""
        self.heads = {
            task: ExpertHead(self.network, self.auto, experts[task], self.heads_of_experts)
            for task in tasks
            if task in experts
        }

    def encode(self, inputs: Inputs, hidden: Sequence[int] = ()) -> Encoded:
        """Images to what the head is given."""
        output = self.network.base_model(self.pixels(inputs), output_hidden_states=bool(hidden))
        return trunk_output(output, hidden, None)


class ClipVisionClassifier(ImageNetwork):
    """The image tower of a CLIP in transformers' format, then the zero-shot head of the sample's task.

    The base is a whole ``CLIPModel``; experts may be whole ones or image towers, ``vision_model.*`` (include these).
    ``visual_projection`` and the text tower are the base's, and frozen.

    Args:
        model: folder of the base, a Hub id, or ``package:NAME/FOLDER``.
        dtype: of the merged copy.

    Raises:
        CheckpointError: the model, its tokenizer or its image processor cannot be loaded.

    Reference: CLIP (Radford et al., 2021), https://arxiv.org/abs/2103.00020, section 3.1.4.
    """

    def __init__(self, model: str, dtype: str = "float32") -> None:
        super().__init__(model, dtype)
        self.tokenizer: Any = load_companion(transformers.AutoTokenizer, self.folder)

    @property
    def auto(self) -> Any:
        """CLIP and its kin."""
        return transformers.AutoModelForZeroShotImageClassification

    def trains(self, name: str) -> bool:
        """The image tower alone."""
        return super().trains(name) and name.startswith(("vision_model.", "visual_projection."))

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Encode every prompt once; experts have no heads of their own."""
        self.heads = {name: ZeroShotHead(self._class_embeddings(name, task)) for name, task in tasks.items()}

    def encode(self, inputs: Inputs, hidden: Sequence[int] = ()) -> Encoded:
        """Images to projected features, not normalised, and hidden states of the image tower."""
        output = self.network.vision_model(self.pixels(inputs), output_hidden_states=bool(hidden))
        states = hidden_states(output.hidden_states, hidden) if hidden else ()
        return Encoded(self.network.visual_projection(output.pooler_output), states)

    @torch.no_grad()
    def _class_embeddings(self, name: str, task: Task) -> Tensor:
        prompts = class_prompts(name, task)
        found = []
        for first in range(0, len(prompts), 256):
            words = self.tokenizer(
                prompts[first : first + 256],
                padding=True,
                truncation=True,
                max_length=self.network.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.network.device)
            pooled = self.network.text_model(words["input_ids"], words["attention_mask"]).pooler_output
            found.append(nn.functional.normalize(self.network.text_projection(pooled).float(), dim=-1))
        means = torch.cat(found).view(len(task.classnames), len(task.templates), -1).mean(dim=1)
        return self.network.logit_scale.float().exp() * nn.functional.normalize(means, dim=-1)
