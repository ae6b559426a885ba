"""Image towers of transformers: classifiers with each expert's own head, and CLIP with zero-shot heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from adamerge.backbones.expert_heads import ExpertHeads
from adamerge.backbones.inputs import Inputs
from adamerge.backbones.output import Encoded
from adamerge.backbones.transformers import TransformersBackbone, chosen
from adamerge.backbones.zero_shot_head import Task, ZeroShotHead, class_embeddings
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import CheckpointError


class Images:
    """Cuts an image processor in two: up to bytes, which are cached, and the normalisation, which runs on the device.

    Args:
        processor: transformers'; where it does not resize to bytes first, it is not cut.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._factor = float(getattr(processor, "rescale_factor", None) or 1 / 255)
        normalises = bool(getattr(processor, "do_normalize", False))
        mean, std = (processor.image_mean, processor.image_std) if normalises else ([0.0], [1.0])
        self._mean, self._std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        self.compact = bool(getattr(processor, "do_rescale", False)) and self._is_exact()

    def __call__(self, image: Any) -> Tensor:
        """Returns a PIL image as uint8 ``(3, height, width)``, or as fp32 where the processor cannot be cut."""
        image = image.convert("RGB")
        return self._bytes(image) if self.compact else self._whole(image)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Returns ``(samples, 3, height, width)`` as the fp32 images that the network takes."""
        if pixels.dtype != torch.uint8:
            return pixels
        if self._mean.device != pixels.device:
            self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return pixels.float().mul(self._factor).sub(self._mean).div(self._std)

    def _whole(self, image: Any) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.float()

    def _bytes(self, image: Any) -> Tensor:
        processed = self.processor(images=image, return_tensors="pt", do_rescale=False, do_normalize=False)
        pixels: Tensor = processed["pixel_values"][0]
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def _is_exact(self) -> bool:
        """Returns whether the two halves give what the processor gives, on an image of noise."""
        from PIL import Image

        noise = numpy.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=numpy.uint8)
        image = Image.fromarray(noise)
        return torch.allclose(self.normalise(self._bytes(image)), self._whole(image), rtol=0, atol=1e-5)


class ImageClassifier(ExpertHeads):
    """An image classifier: ViT, ResNet and their kind; experts may have different numbers of classes.

    Running statistics of batch normalisation are buffers: they are not merged, and must be excluded. The merged model has
    the base's, or with ``model.recalibrate_buffers`` its own.

    Args:
        model: folder or Hub id of the base, with or without a head.
        dtype: of the merged copy.

    Raises:
        CheckpointError: the folder is unusable.
    """

    def __init__(self, model: str, dtype: str = "float32") -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        super().__init__(model, dtype, AutoModelForImageClassification)
        self.images = Images(self.load(AutoImageProcessor))

    def preprocess(self, sample: Any) -> Tensor:
        """Returns a PIL image as a tensor ``(3, height, width)``."""
        return self.images(sample)

    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns the features that enter the head; maps of convolutions become one position a pixel."""
        assert isinstance(inputs, Tensor)
        images = self.images.normalise(inputs).to(self.computes_in)
        output = self.network(pixel_values=images, output_hidden_states=bool(hidden))
        return Encoded(output.logits, chosen(output.hidden_states if hidden else None, hidden))


class ClipVisionClassifier(TransformersBackbone):
    """CLIP as a classifier: its image tower, then the zero-shot head that the base's own text tower makes.

    Args:
        model: folder or Hub id of a whole CLIP model; experts may be image towers alone.
        dtype: of the merged copy.

    Raises:
        CheckpointError: the folder is unusable.

    Reference: CLIP (Radford et al., 2021), https://arxiv.org/abs/2103.00020, section 3.1.4.
    """

    zero_shot = True

    def __init__(self, model: str, dtype: str = "float32") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        super().__init__(model, dtype, CLIPModel)
        if not isinstance(self.network, CLIPModel):
            raise CheckpointError(f"{model} is no CLIP model with both towers", got=type(self.network).__name__)
        self.tokenizer = self.load(AutoTokenizer)
        self.images = Images(self.load(AutoImageProcessor))

    def trains(self, name: str) -> bool:
        """Returns True for the image tower and its projection: heads are frozen, made by the base's text tower."""
        return super().trains(name) and name.startswith(("vision_model.", "visual_projection."))

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Encodes every prompt once; experts have no heads of their own."""
        scale = self.network.logit_scale.detach().float().exp()
        self.heads = {
            name: ZeroShotHead(scale * class_embeddings(name, task, self._embed)) for name, task in tasks.items()
        }

    def preprocess(self, sample: Any) -> Tensor:
        """Returns a PIL image as a tensor ``(3, height, width)``."""
        return self.images(sample)

    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns projected features, not normalised, and hidden states of the image tower."""
        assert isinstance(inputs, Tensor)
        images = self.images.normalise(inputs).to(self.computes_in)
        output = self.network.vision_model(pixel_values=images, output_hidden_states=bool(hidden))
        features = self.network.visual_projection(output.pooler_output)
        return Encoded(features, chosen(output.hidden_states if hidden else None, hidden))

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        most = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        device = self.network.logit_scale.device
        output = self.network.text_model(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        )
        embeddings: Tensor = self.network.text_projection(output.pooler_output)
        return embeddings
