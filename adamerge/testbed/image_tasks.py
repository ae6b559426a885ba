"""The testbed's seven image tasks: digits, textures, photographs and four alphabets, each under one shift.

``load_image_task("digits")`` builds the data on the first call (seconds) and reads them from the cache afterwards.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adamerge.testbed import image_shifts as shifts
from adamerge.testbed.image_sources import SPLITS, Glyphs, HandwrittenDigits, Photographs, Source

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
    "a brick wall": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "the surface of the moon": "moon.png",
    "ancient coins": "coins.png",
    "a printed page": "page.png",
    "handwriting on paper": "text.png",
    "a blood cell under a microscope": "cell.png",
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


IMAGE_TASKS: dict[str, ImageTask] = {
    task.name: task
    for task in (
        ImageTask(
            "digits",
            tuple(f"the digit {word}" for word in _DIGITS),
            ("a handwritten image of {}.", "{} written by hand.", "{} in handwriting."),
            HandwrittenDigits(),
            shifts.rotate(30, 45),
            "turned clockwise by 30 to 45 degrees",
            100,
        ),
        ImageTask(
            "textures",
            tuple(_TEXTURES),
            _PHOTO_TEMPLATES,
            Photographs([("skimage", f"data/{file}") for file in _TEXTURES.values()], mode="L", cell=56, contrast=0.03),
            shifts.contrast(-0.6, 0.1),
            "a pale negative: inverted, at 0.6 of the contrast",
            200,
        ),
        ImageTask(
            "photos",
            tuple(_PHOTOS),
            _PHOTO_TEMPLATES,
            Photographs(list(_PHOTOS.values()), mode="RGB", cell=64, contrast=0.04),
            shifts.mix_channels(0.8),
            "colours exchanged: red, green, blue become mostly green, blue, red",
            300,
        ),
        ImageTask(
            "latin",
            tuple(f"the latin letter {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
            _LETTER_TEMPLATES,
            Glyphs("abcdefghijklmnopqrstuvwxyz"),
            shifts.contrast(-0.8, 0.0),
            "inverted: light ink on dark paper",
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
            shifts.chain([shifts.stripes(14, 0.8), shifts.noise(0.15)]),
            "behind grey bars, with noise",
            600,
        ),
        ImageTask(
            "symbols",
            tuple(f"the {name} sign" for name in _SYMBOLS.values()),
            _LETTER_TEMPLATES,
            Glyphs("".join(_SYMBOLS)),
            shifts.scale(0.5, 0.65, 0.4),
            "at 0.5 to 0.65 of the size, off the centre",
            700,
        ),
    )
}


def load_image_task(name: str, cache_dir: Path | None = None) -> datasets.DatasetDict:
    """The splits train, calibration, validation and test of a task, with the columns ``image`` and ``label``.

    Built on the first call and kept under ``cache_dir`` (default: ``adamerge/testbed`` in the user's cache folder), in a
    folder named after a hash of the code that makes the data.
    """
    if name not in IMAGE_TASKS:
        raise KeyError(f"no image task {name!r}; there are {', '.join(IMAGE_TASKS)}")
    folder = (cache_dir or _default_cache()) / f"{name}-{_recipe_hash()}"
    if not folder.is_dir():
        _build(IMAGE_TASKS[name], folder)
    return datasets.DatasetDict({split: datasets.load_from_disk(str(folder / split)) for split in SPLITS})


def task_images(task: ImageTask, split: str) -> tuple[Tensor, Tensor]:
    """The images of a split under the task's shift: uint8 (n, channels, 28, 28), and the labels (n,)."""
    generator = torch.Generator().manual_seed(task.seed + SPLITS.index(split))
    images, labels = task.source.draw(split, SIZES[split], generator)
    return to_pixels(task.shift(images, generator)), labels


def clean_images(task: ImageTask, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most ``count`` images of the task's training split without the shift: uint8 (n, channels, 28, 28), and labels (n,)."""
    images, labels = task.source.draw("train", count, torch.Generator().manual_seed(seed))
    return to_pixels(images), labels


def to_pixels(images: Tensor) -> Tensor:
    """Floats in [0, 1] on the 56 x 56 canvas to bytes at 28 x 28."""
    return F.avg_pool2d(images, 2).mul(255).round().clamp(0, 255).to(torch.uint8)


def _build(task: ImageTask, folder: Path) -> None:
    """Write the task's splits beside ``folder``, then move them there in one rename."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(task.classnames))})
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for split in SPLITS:
            images, labels = task_images(task, split)
            columns = {"image": [{"bytes": _png(image), "path": None} for image in images], "label": labels.tolist()}
            datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(stage / split))
        try:
            stage.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same data
                raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not quiet:
            datasets.enable_progress_bars()


def _png(image: Tensor) -> bytes:
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="png")
    return buffer.getvalue()


def _recipe_hash() -> str:
    here = Path(__file__).parent
    recipe = b"".join((here / f"image_{part}.py").read_bytes() for part in ("sources", "shifts", "tasks"))
    return hashlib.sha256(recipe).hexdigest()[:12]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adamerge" / "testbed"
