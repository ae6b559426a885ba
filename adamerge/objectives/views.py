"""Views: randomly changed copies of samples, made on the device; a view is a function of sample and seed alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.backbones import Backbone, Inputs
from adamerge.deltas.splitmix64 import mixed
from adamerge.errors import ConfigError

TRIES = 10  # as many as torchvision's RandomResizedCrop takes


class View(ABC):
    """Makes a changed copy of each sample of a batch.

    Attributes:
        lengthens: whether a sample may get longer; where False, what was padding stays padding, and need not be run.
    """

    lengthens: bool = True

    def of(self, backbone: Backbone) -> View:
        """Returns the view for samples that a backbone has preprocessed; itself where it asks nothing of the backbone.

        Raises:
            ConfigError: the backbone's samples have not what the view changes.
        """
        return self

    @abstractmethod
    def __call__(self, inputs: Inputs, seeds: Tensor) -> Inputs:
        """Returns the changed samples, each by its own seed: whatever batch it is in, a sample looks the same.

        Args:
            inputs: preprocessed, ``(samples, ...)``.
            seeds: int64 ``(samples,)`` on the CPU, from ``seeds_of``; what they choose is known without asking a device.
        """


class Unchanged(View):
    """Leaves the samples as they are; for data of which no other views are known."""

    lengthens = False

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Inputs:
        """Returns the inputs as they are, whatever the seeds."""
        return inputs


class Composed(View):
    """Several views one after the other, each with random numbers of its own.

    Args:
        views: in their order.

    Raises:
        ConfigError: there are none.
    """

    def __init__(self, views: Sequence[View]) -> None:
        if not views:
            raise ConfigError("Composed: views must name at least one view")
        self.views = list(views)
        self.lengthens = any(view.lengthens for view in self.views)

    def of(self, backbone: Backbone) -> Composed:
        """Returns the same views in the same order, each for samples that the backbone has preprocessed."""
        return Composed([view.of(backbone) for view in self.views])

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Inputs:
        """Returns what the last view makes of what the ones before it made of the samples."""
        for place, view in enumerate(self.views):
            inputs = view(inputs, mixed(seeds * 31 + place + 1))
        return inputs


class FlipAndShift(View):
    """Images flipped sideways now and then, and shifted by whole pixels; the border is repeated.

    Args:
        flip: probability; 0 where mirror images mean something else, as with digits and letters.
        shift: largest shift as a share of height and width, in both directions.

    Raises:
        ConfigError: a number is out of range; in use: the inputs are not images.

    Reference: FixMatch (Sohn et al., 2020), https://arxiv.org/abs/2001.07685, section 2.3: weak augmentation.
    """

    def __init__(self, flip: float = 0.5, shift: float = 0.125) -> None:
        if not (0 <= flip <= 1 and 0 <= shift < 1):
            raise ConfigError(f"FlipAndShift: flip and shift must be shares, got {flip} and {shift}")
        self.flip, self.shift = flip, shift

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Tensor:
        """Returns flipped and shifted images of the same shape, uint8 ``(samples, channels, height, width)``."""
        images = images_of(self, inputs)
        height, width = images.shape[2:]
        first, second, third = (numbers_on(images.device, seeds, number) for number in range(3))
        rows, columns = self._places(height, first), self._places(width, second)
        flipped = (third < self.flip)[:, None]
        columns = torch.where(flipped, width - 1 - columns, columns)
        images = images.take_along_dim(rows[:, None, :, None], dim=2)
        return images.take_along_dim(columns[:, None, None, :], dim=3)

    def _places(self, size: int, numbers: Tensor) -> Tensor:
        """Returns which of ``size`` positions each new one is taken from, ``(samples, size)``."""
        largest = int(self.shift * size)
        shifts = (numbers * (2 * largest + 1)).long() - largest
        return (torch.arange(size, device=numbers.device) + shifts[:, None]).clamp(0, size - 1)


class CropAndFlip(View):
    """Images of which a random part is enlarged to the size of the whole, and flipped sideways now and then.

    The part has ``smallest`` to all of the area, evenly, and sides whose ratio is up to ``ratio``, evenly in its logarithm;
    ten tries find one that fits, else it is the whole. It is enlarged by bicubic interpolation.

    Args:
        smallest: share of the area that is seen at least.
        flip: probability; 0 where mirror images mean something else, as with digits and letters.
        ratio: largest ratio of width to height, and of height to width.

    Raises:
        ConfigError: a number is out of range; in use: the inputs are not images.

    Reference: aTLAS (Zhang et al., 2024), https://arxiv.org/abs/2407.02880, appendix E: RandomResizedCrop(0.5, 1) and a flip,
    as Tip-Adapter (Zhang et al., 2022), https://arxiv.org/abs/2207.09519, has them; here of the preprocessed image.
    """

    def __init__(self, smallest: float = 0.5, flip: float = 0.5, ratio: float = 4 / 3) -> None:
        if not (0 < smallest <= 1 and 0 <= flip <= 1):
            raise ConfigError(f"CropAndFlip: smallest and flip must be shares, got {smallest} and {flip}")
        if not 1 <= ratio < math.inf:
            raise ConfigError(f"CropAndFlip: ratio must be at least 1, got {ratio}")
        self.smallest, self.flip, self.ratio = smallest, flip, ratio

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Tensor:
        """Returns cropped and flipped images of the same shape, uint8 ``(samples, channels, height, width)``."""
        images = images_of(self, inputs)
        size = list(images.shape[2:])
        flipped = (uniform(seeds, 0) < self.flip).tolist()
        enlarged = []
        for number, (top, left, height, width) in enumerate(self.boxes(size, seeds).tolist()):
            part = images[number : number + 1, :, top : top + height, left : left + width].float()
            whole = torch.nn.functional.interpolate(part, size, mode="bicubic", antialias=True)  # as Pillow does it
            enlarged.append(whole.flip(-1) if flipped[number] else whole)
        return torch.cat(enlarged).round().clamp(0, 255).to(torch.uint8)

    def boxes(self, size: Sequence[int], seeds: Tensor) -> Tensor:
        """Returns top, left, height and width of each sample's part, int64 ``(samples, 4)``.

        Args:
            size: height and width of the whole.
            seeds: of the samples.
        """
        whole = torch.tensor(size, dtype=torch.float64)[:, None]
        drawn = torch.stack([uniform(seeds, number) for number in range(1, 3 + 2 * TRIES)]).double()
        places, areas, ratios = drawn.split([2, TRIES, TRIES])
        areas = (self.smallest + (1 - self.smallest) * areas) * whole.prod()
        ratios = self.ratio ** (2 * ratios - 1)
        sides = torch.stack([areas / ratios, areas * ratios]).sqrt().round().clamp_min(1)  # (2, tries, samples)
        fits = (sides <= whole[:, None]).all(dim=0).int()
        tried = sides.gather(1, fits.argmax(dim=0).expand(2, 1, -1))[:, 0]
        sides = torch.where(fits.any(dim=0), tried, whole)
        return torch.cat([(places * (whole - sides + 1)).floor(), sides]).T.long()


def seeds_of(seed: int, step: int, indices: Tensor, purpose: int = 0) -> Tensor:
    """Returns one int64 seed per sample, ``(samples,)``, from the run's seed, the step and the samples' numbers."""
    seeds = torch.full_like(indices, seed)
    for part in (purpose, step, indices):
        seeds = mixed(seeds * 31 + part + 1)
    return seeds


def uniform(seeds: Tensor, number: int | Tensor) -> Tensor:
    """Returns the ``number``-th random number of each seed, fp32 in [0, 1): the same on every device."""
    bits = mixed(seeds * 31 + number + 1)
    return (bits & 0xFFFFFF).float() / 0x1000000


def numbers_on(device: torch.device, seeds: Tensor, number: int) -> Tensor:
    """Returns the ``number``-th random number of each seed, as ``uniform`` gives it, on the device."""
    return uniform(seeds, number).to(device, non_blocking=True)


def images_of(view: View, inputs: Inputs) -> Tensor:
    """Returns the inputs, if they are preprocessed images.

    Raises:
        ConfigError: they are not.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.dtype != torch.uint8:
        what = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else f"tensors {sorted(inputs)}"
        raise ConfigError(
            f"{type(view).__name__} is for images",
            expected="uint8 (samples, channels, height, width)",
            got=what,
            todo="for samples as they are, pass adamerge.Unchanged instead",
        )
    return inputs
