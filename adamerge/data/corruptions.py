"""Corruptions: noise, blur, less contrast and JPEG, of 8-bit pictures, to see what a merged model makes of worse inputs."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy
from PIL import Image, ImageFilter

from adamerge.errors import ConfigError

if TYPE_CHECKING:
    from adamerge.data.base import Calibration


class Corruption(ABC):
    """Spoils a picture: the same picture in the same way, whatever batch or process it is in.

    Attributes:
        name: in tables.

    Reference: ImageNet-C (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261; its kinds in one strength each,
    sizes as shares of the picture's, so that pictures of 28 and of 224 pixels are spoiled alike.
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, picture: Image.Image) -> Image.Image:
        """Returns the spoiled picture, 8-bit RGB of the same size."""


@dataclass(frozen=True)
class Noise(Corruption):
    """Gaussian noise on each channel of each pixel, seeded by the picture's own bytes; clipped to 0 ... 255.

    Args:
        deviation: standard deviation as a share of 255.
    """

    name: ClassVar[str] = "noise"
    deviation: float = 0.1

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Returns the noisy picture."""
        values = numpy.asarray(picture, dtype=numpy.float64)
        seed = int.from_bytes(hashlib.sha256(values.tobytes()).digest()[:8], "little")
        drawn = numpy.random.Generator(numpy.random.PCG64(seed)).standard_normal(values.shape)
        return _picture(values + 255 * self.deviation * drawn)


@dataclass(frozen=True)
class Blur(Corruption):
    """Gaussian blur.

    Args:
        width: standard deviation as a share of the shorter side.
    """

    name: ClassVar[str] = "blur"
    width: float = 0.05

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Returns the blurred picture."""
        return picture.filter(ImageFilter.GaussianBlur(self.width * min(picture.size)))


@dataclass(frozen=True)
class Contrast(Corruption):
    """Less contrast: ``mean + share * (x - mean)``, with the mean of each channel over the picture.

    Args:
        share: of the contrast that is left.
    """

    name: ClassVar[str] = "contrast"
    share: float = 0.4

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Returns the paler picture."""
        values = numpy.asarray(picture, dtype=numpy.float64)
        mean = values.mean(axis=(0, 1), keepdims=True)
        return _picture(mean + self.share * (values - mean))


@dataclass(frozen=True)
class Jpeg(Corruption):
    """JPEG compression.

    Args:
        quality: as Pillow counts it, 1 to 95.
    """

    name: ClassVar[str] = "JPEG"
    quality: int = 15

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Returns the picture as it comes back from a JPEG file."""
        file = io.BytesIO()
        picture.save(file, format="jpeg", quality=self.quality)
        return Image.open(file).convert("RGB")


CORRUPTIONS: tuple[Corruption, ...] = (Noise(), Blur(), Contrast(), Jpeg())
"""What ``adamerge compare --corruptions`` scores under, in strengths of ImageNet-C's middle, for pictures of any size."""


def check_pictures(data: Calibration, split: str) -> None:
    """Checks whether every task's samples have a picture that can be spoiled.

    Raises:
        ConfigError: those of one have none.
    """
    from datasets import Image as Pictures

    for task in data.tasks:
        features = data.rows(task, split).features
        if not any(isinstance(features.get(column), Pictures) for column in data.columns(task)):
            raise ConfigError(
                f"corruptions are for pictures, and task '{task}' has none",
                expected="a column of pictures",
                got=f"columns {list(data.columns(task))}",
                todo="leave out --corruptions",
            )


def _picture(values: Any) -> Image.Image:
    """Returns 8-bit RGB from floats ``(height, width, 3)``, rounded and clipped."""
    return Image.fromarray(values.round().clip(0, 255).astype(numpy.uint8))
