"""Views of texts: tokens left out or masked, or a span of them alone; marks of begin and end stay, and so does padding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from adamerge.backbones import Backbone, Inputs
from adamerge.backbones.inputs import TextPlace
from adamerge.errors import ConfigError
from adamerge.objectives.views import View, numbers_on, uniform


class TextView(View):
    """A view of texts, which must know from a backbone where in the inputs the text is; none gets longer."""

    lengthens = False

    def __init__(self) -> None:
        self._place: TextPlace | None = None
        self._special: Tensor | None = None

    def of(self, backbone: Backbone) -> View:
        """Returns the view for texts that the backbone has tokenised."""
        place = backbone.text_place()
        if place is None:
            raise ConfigError(
                f"{type(self).__name__} is for texts, and {type(backbone).__name__} does not say where its inputs have one",
                todo="use another view, or let the backbone answer text_place",
            )
        own = copy.copy(self)
        own._place = place
        return own

    def place(self, inputs: Inputs) -> tuple[TextPlace, dict[str, Tensor]]:
        """Returns where the text is, and the inputs by name.

        Raises:
            ConfigError: the view is of no backbone, or the inputs are no texts.
        """
        if self._place is None or not isinstance(inputs, dict):
            raise ConfigError(
                f"{type(self).__name__} is for texts of a backbone",
                got="inputs without names" if isinstance(inputs, Tensor) else f"tensors {sorted(inputs)}",
                todo="ask view.of(backbone) for the view of its texts",
            )
        return self._place, inputs

    def words(self, inputs: dict[str, Tensor], place: TextPlace) -> Tensor:
        """Returns which tokens are text: neither padding nor special; bool ``(samples, positions)``."""
        ids = inputs[place.ids]
        if self._special is None or self._special.device != ids.device:
            self._special = torch.tensor(place.special, dtype=ids.dtype).to(ids.device, non_blocking=True)
        special = (ids[:, :, None] == self._special).any(dim=-1)
        return inputs[place.attended].bool() & ~special


class TokenDropout(TextView):
    """Texts without some of their tokens: what is left moves together, and padding fills the end.

    Each token is left out with probability ``share``; the one with the largest number always stays. Special tokens stay.

    Args:
        share: of the tokens that are left out.

    Raises:
        ConfigError: a number is out of range; in use: the backbone has no texts.

    Reference: EDA (Wei & Zou, 2019), https://arxiv.org/abs/1901.11196: random deletion.
    """

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = _share(self, share)

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Inputs:
        """Returns texts of the same number of positions."""
        place, named = self.place(inputs)
        words = self.words(named, place)
        return without(named, place, words & (_numbers(words, seeds) < self.share))


class TokenMasking(TextView):
    """Texts of which some tokens are masked: the tokenizer's mask stands for each.

    Each token is masked with probability ``share``; the one with the largest number never is. Special tokens stay.

    Args:
        share: of the tokens that are masked.

    Raises:
        ConfigError: a number is out of range; in use: the backbone has no texts, or its tokenizer has no mask.

    Reference: BERT (Devlin et al., 2019), https://arxiv.org/abs/1810.04805, section 3.1.
    """

    def __init__(self, share: float = 0.15) -> None:
        super().__init__()
        self.share = _share(self, share)

    def of(self, backbone: Backbone) -> View:
        """Returns the view for texts that the backbone has tokenised, whose tokenizer must have a mask."""
        place = backbone.text_place()
        if place is not None and place.mask is None:
            raise ConfigError(
                f"TokenMasking: the tokenizer of this {type(backbone).__name__} has no mask",
                todo="leave tokens out instead: adamerge.TokenDropout",
            )
        return super().of(backbone)

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Inputs:
        """Returns texts of the same positions."""
        place, named = self.place(inputs)
        assert place.mask is not None
        words = self.words(named, place)
        masked = words & (_numbers(words, seeds) < self.share)
        return named | {place.ids: named[place.ids].masked_fill(masked, place.mask)}


class SpanCrop(TextView):
    """A span of each text alone: its tokens move to the front, and padding fills the end.

    The span has an even share between ``smallest`` and 1 of the tokens, rounded up, and begins anywhere it fits, evenly.
    Special tokens stay, before and behind it.

    Args:
        smallest: share of the tokens that is seen at least.

    Raises:
        ConfigError: a number is out of range; in use: the backbone has no texts.

    Reference: CoCo-LM (Meng et al., 2021), https://arxiv.org/abs/2102.08473: cropped sequences as views.
    """

    def __init__(self, smallest: float = 0.5) -> None:
        super().__init__()
        if not 0 < smallest <= 1:
            raise ConfigError(f"SpanCrop: smallest must be a share above 0, got {smallest}")
        self.smallest = smallest

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Inputs:
        """Returns texts of the same number of positions."""
        place, named = self.place(inputs)
        words = self.words(named, place)
        share, start = (numbers_on(words.device, seeds, number)[:, None] for number in range(2))
        length = words.sum(dim=1, keepdim=True)
        span = (length * (self.smallest + (1 - self.smallest) * share)).ceil().long().clamp_min(1)
        first = (start * (length - span + 1)).long()
        number = words.cumsum(dim=1) - 1  # of each token among those of the text
        return without(named, place, words & ((number < first) | (number >= first + span)))


def without(inputs: dict[str, Tensor], place: TextPlace, left_out: Tensor) -> dict[str, Tensor]:
    """Returns texts without some positions: what is left moves together, with zeros and no attention behind it.

    Args:
        inputs: by name.
        place: where the text is in them.
        left_out: bool ``(samples, positions)``.
    """
    stays = inputs[place.attended].bool() & ~left_out
    order = (~stays).int().argsort(dim=1, stable=True)
    there = stays.gather(1, order)
    moved = {
        name: torch.where(there, inputs[name].gather(1, order), torch.zeros_like(inputs[name]))
        for name in place.along
        if name in inputs
    }
    return inputs | moved


def _numbers(words: Tensor, seeds: Tensor) -> Tensor:
    """Returns an even random number of each position, of which the largest of a text is made 1: ``(samples, positions)``."""
    numbers = uniform(seeds[:, None], torch.arange(words.shape[1])).to(words.device, non_blocking=True)
    best = torch.where(words, numbers, -1.0).argmax(dim=1, keepdim=True)
    return numbers.scatter(1, best, 1.0)


def _share(view: View, share: float) -> float:
    if not 0 <= share < 1:
        raise ConfigError(f"{type(view).__name__}: share must be below 1, got {share}")
    return share
