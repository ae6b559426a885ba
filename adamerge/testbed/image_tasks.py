"""The testbed's seven image tasks: digits, textures, photographs and four alphabets, each under one shift.

``load_image_task("digits")`` builds the data on the first call (seconds) and reads them from the cache afterwards.
"""

# ruff: noqa: RUF001  (letters that look like Latin ones are the point)

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adamerge.testbed import image_shifts as shifts
from adamerge.testbed.cache import SPLITS, cached_splits
from adamerge.testbed.image_sources import Glyphs, HandwrittenDigits, Photographs, Source

if TYPE_CHECKING:  # its tasks are told before a data set is read
    import datasets

Files = Mapping[str, tuple[str, str]]  # class name -> (package, path inside it)
SIZES: Mapping[str, int] = {"train": 4000, "calibration": 600, "validation": 250, "test": 1000}


@dataclass(frozen=True)
class ImageTask:
    """A classification task: clean images of a source under one shift, and the words for a zero-shot head."""

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]  # each with one {}, which takes a class name
    source: Source
    shift: shifts.Shift
    shift_description: str
    seed: int


_PHOTO_TEMPLATES = ("a photo of {}.", "part of a photo of {}.", "a close-up photo of {}.")
_LETTER_TEMPLATES = ("{}.", "a printed image of {}.", "a scan of {}.")

_TEXTURES = {
    "a brick wall": ("skimage", "data/brick.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "the surface of the moon": ("skimage", "data/moon.png"),
    "ancient coins": ("skimage", "data/coins.png"),
    "a printed page": ("skimage", "data/page.png"),
    "handwriting on paper": ("skimage", "data/text.png"),
    "a blood cell under a microscope": ("skimage", "data/cell.png"),
}
_PHOTOS = {
    "an astronaut": ("skimage", "data/astronaut.png"),
    "a cat": ("skimage", "data/chelsea.png"),
    "a cup of coffee": ("skimage", "data/coffee.png"),
    "a rocket on the launch pad": ("skimage", "data/rocket.jpg"),
    "a motorcycle": ("skimage", "data/motorcycle_left.png"),
    "the retina of an eye": ("skimage", "data/retina.jpg"),
    "stars and galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "stained tissue": ("skimage", "data/ihc.png"),
    "a flower": ("sklearn", "datasets/images/flower.jpg"),
    "a chinese temple": ("sklearn", "datasets/images/china.jpg"),
}
# The base has seen these too; as classes of a task they are too heterogeneous, or have too few cells that are not flat.
_ONLY_PRETRAINED = ("the surface of the moon", "an astronaut", "a chinese temple")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta",
    "θ": "theta", "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "ο": "omicron",
    "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "υ": "upsilon", "φ": "phi", "χ": "chi", "ψ": "psi",
    "ω": "omega",
}  # fmt: skip
_CYRILLIC = {
    "А": "a", "Б": "be", "В": "ve", "Г": "ge", "Д": "de", "Е": "ye", "Ж": "zhe", "З": "ze", "И": "i",
    "К": "ka", "Л": "el", "М": "em", "Н": "en", "О": "o", "П": "pe", "Р": "er", "С": "es", "Т": "te",
    "У": "u", "Ф": "ef", "Х": "kha", "Ц": "tse", "Ч": "che", "Ш": "sha", "Ы": "yery", "Ь": "soft sign",
    "Э": "e", "Ю": "yu", "Я": "ya",
}  # fmt: skip
_SYMBOLS = {
    "∂": "partial derivative", "∞": "infinity", "∑": "summation", "√": "square root", "∫": "integral",
    "≈": "approximately equal", "≠": "not equal", "≤": "less or equal", "≥": "greater or equal",
    "±": "plus minus", "×": "multiplication", "÷": "division", "∈": "element of", "∪": "union",
    "∩": "intersection", "⊂": "subset", "⊃": "superset", "∀": "for all", "∃": "there exists",
    "∅": "empty set", "∇": "nabla gradient", "→": "right arrow", "←": "left arrow", "↑": "up arrow",
    "↓": "down arrow", "⊕": "direct sum", "⊥": "perpendicular", "∠": "angle", "¬": "logical not",
    "∝": "proportional",
}  # fmt: skip


def _without(files: Files, names: tuple[str, ...]) -> Files:
    return {name: file for name, file in files.items() if name not in names}


def _textures(files: Files) -> Photographs:
    return Photographs(list(files.values()), mode="L", cell=56, contrast=0.03)


def _photos(files: Files) -> Photographs:
    return Photographs(list(files.values()), mode="RGB", cell=64, contrast=0.04)


IMAGE_TASKS: dict[str, ImageTask] = {
    task.name: task
    for task in (
        ImageTask(
            "digits",
            tuple(f"the digit {word}" for word in _DIGITS),
            ("a handwritten image of {}.", "{} written by hand.", "{} in handwriting."),
            HandwrittenDigits(),
            shifts.rotate(25, 40),
            "turned clockwise by 25 to 40 degrees",
            100,
        ),
        ImageTask(
            "textures",
            tuple(_without(_TEXTURES, _ONLY_PRETRAINED)),
            _PHOTO_TEMPLATES,
            _textures(_without(_TEXTURES, _ONLY_PRETRAINED)),
            shifts.contrast(-1.0),
            "inverted: the negative",
            200,
        ),
        ImageTask(
            "photos",
            tuple(_without(_PHOTOS, _ONLY_PRETRAINED)),
            _PHOTO_TEMPLATES,
            _photos(_without(_PHOTOS, _ONLY_PRETRAINED)),
            shifts.mix_channels(0.4),
            "colours moved: each channel takes 0.4 of the next one",
            300,
        ),
        ImageTask(
            "latin",
            tuple(f"the latin letter {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
            _LETTER_TEMPLATES,
            Glyphs("abcdefghijklmnopqrstuvwxyz"),
            shifts.rotate(-35, -20),
            "turned anticlockwise by 20 to 35 degrees",
            400,
        ),
        ImageTask(
            "greek",
            tuple(f"the greek letter {name}" for name in _GREEK.values()),
            _LETTER_TEMPLATES,
            Glyphs("".join(_GREEK)),
            shifts.shear(0.45, 0.7),
            "slanted by 0.45 to 0.7 of the height",
            500,
        ),
        ImageTask(
            "cyrillic",
            tuple(f"the cyrillic letter {name}" for name in _CYRILLIC.values()),
            _LETTER_TEMPLATES,
            Glyphs("".join(_CYRILLIC)),
            shifts.chain([shifts.stripes(14, 0.6), shifts.noise(0.12)]),
            "behind grey bars, with noise",
            600,
        ),
        ImageTask(
            "symbols",
            tuple(f"the {name} sign" for name in _SYMBOLS.values()),
            _LETTER_TEMPLATES,
            Glyphs("".join(_SYMBOLS)),
            shifts.scale(0.6, 0.75, 0.3),
            "at 0.6 to 0.75 of the size, off the centre",
            700,
        ),
    )
}

# What the base is pre-trained on, without the shifts: the same, with every photograph.
PRETRAINING_TASKS: dict[str, ImageTask] = {
    **IMAGE_TASKS,
    "textures": replace(IMAGE_TASKS["textures"], classnames=tuple(_TEXTURES), source=_textures(_TEXTURES)),
    "photos": replace(IMAGE_TASKS["photos"], classnames=tuple(_PHOTOS), source=_photos(_PHOTOS)),
}


def load_image_task(name: str, cache_dir: Path | None = None) -> datasets.DatasetDict:
    """Return the splits train, calibration, validation and test, with the columns ``image`` and ``label``.

    They are built on the first call and kept under ``cache_dir`` (default: ``adamerge/testbed`` in the user's cache
    folder), in a folder named after a hash of the code that makes the data.
    """
    import datasets

    if name not in IMAGE_TASKS:
        raise KeyError(f"no image task {name!r}; there are {', '.join(IMAGE_TASKS)}")
    task, here = IMAGE_TASKS[name], Path(__file__).parent
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(task.classnames))})

    def build() -> Iterator[tuple[str, datasets.Dataset]]:
        for split in SPLITS:
            images, labels = task_images(task, split)
            columns = {"image": [{"bytes": _png(image), "path": None} for image in images], "label": labels.tolist()}
            yield split, datasets.Dataset.from_dict(columns, features=features)

    recipe = [here / f"image_{part}.py" for part in ("sources", "shifts", "tasks")]
    return cached_splits(name, recipe, build, cache_dir)


def task_images(task: ImageTask, split: str) -> tuple[Tensor, Tensor]:
    """Make the images of a split under the task's shift: uint8 (n, channels, 28, 28), and the labels (n,)."""
    generator = torch.Generator().manual_seed(task.seed + SPLITS.index(split))
    images, labels = task.source.draw(split, SIZES[split], generator)
    return to_pixels(task.shift(images, generator)), labels


def clean_images(task: ImageTask, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make at most ``count`` images of the training split without the shift: as ``task_images`` returns them."""
    images, labels = task.source.draw("train", count, torch.Generator().manual_seed(seed))
    return to_pixels(images), labels


def to_pixels(images: Tensor) -> Tensor:
    """Turn floats in [0, 1] on the 56 x 56 canvas into bytes at 28 x 28."""
    return F.avg_pool2d(images, 2).mul(255).round().clamp(0, 255).to(torch.uint8)


def _png(image: Tensor) -> bytes:
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="png")
    return buffer.getvalue()
