"""The testbed's four domains for language models: source code, markup, dictionary glosses, Romance languages.

``load_causal_task("code")`` builds the chunks of text on the first call (seconds) and reads them from the cache afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adamerge.testbed.cache import SPLITS, cached_splits
from adamerge.testbed.causal_sources import (
    Files,
    Lines,
    TextSource,
    Translations,
    chunks,
    fingerprint,
    versions,
)

if TYPE_CHECKING:  # its tasks are told before a data set is read
    import datasets

SIZES: Mapping[str, int] = {"train": 6000, "calibration": 300, "validation": 150, "test": 400}
MIN_BYTES = 80  # shorter chunks say little


@dataclass(frozen=True)
class CausalTask:
    """A domain of text: a source, and how it is cut into chunks."""

    name: str
    description: str
    source: TextSource
    chunk_bytes: int  # so that hardly a chunk has more than 128 tokens
    per_document: int  # chunks that a document gives to calibration, validation or test at most


CAUSAL_TASKS: dict[str, CausalTask] = {
    task.name: task
    for task in (
        CausalTask(
            "code",
            "Python source of Trac",
            Files("Trac", ("trac", "tracopt"), ("**/*.py",), header=r"^(#[^\n]*\n|\s*\n)+"),
            280,
            32,
        ),
        CausalTask(
            "markup",
            "HTML templates and wiki pages of Trac",
            Files("Trac", ("trac",), ("**/*.html", "wiki/default-pages/*"), header=r"(?s)^\{#.*?#\}\s*"),
            300,
            32,
        ),
        CausalTask(
            "glosses",
            "WordNet's definitions of nouns",
            Lines("timm", "timm", "data/_info/imagenet_synset_to_definition.txt", lines=40),
            330,
            6,
        ),
        CausalTask(
            "romance",
            "messages of Trac and JupyterLab in French, and of Trac in six of its sister languages",
            Translations(
                (
                    ("Trac", "trac", "locale/{}/LC_MESSAGES/messages.mo"),
                    ("Trac", "trac", "locale/{}/LC_MESSAGES/tracini.mo"),
                    *(
                        (
                            "jupyterlab-language-pack-fr-FR",
                            "jupyterlab_language_pack_fr_FR",
                            f"locale/{{}}_FR/LC_MESSAGES/{name}.mo",
                        )
                        for name in ("jupyterlab", "jupyterlab_git", "jupyterlab_lsp", "jupyterlab_tour", "notebook")
                    ),
                ),
                ("fr", "it", "pt_BR", "pt", "es", "gl", "ca", "ro"),
                messages=12,
            ),
            240,
            12,
        ),
    )
}


def load_causal_task(name: str, cache_dir: Path | None = None) -> datasets.DatasetDict:
    """Return the splits train, calibration, validation and test, with the column ``text``: one chunk a row.

    They are built on the first call and kept under ``cache_dir`` (default: ``adamerge/testbed`` in the user's cache
    folder), in a folder named after a hash of the code that makes them and of the versions of the packages they are from.
    """
    import datasets

    if name not in CAUSAL_TASKS:
        raise KeyError(f"no causal task {name!r}; there are {', '.join(CAUSAL_TASKS)}")
    task, here = CAUSAL_TASKS[name], Path(__file__).parent

    def build() -> Iterator[tuple[str, datasets.Dataset]]:
        for split, texts in task_texts(task).items():
            yield split, datasets.Dataset.from_dict({"text": texts})

    recipe = [here / f"causal_{part}.py" for part in ("sources", "tasks")]
    return cached_splits(f"causal-{name}", recipe, build, cache_dir, versions(task.source))


def task_texts(task: CausalTask) -> dict[str, list[str]]:
    """Cut the task's documents into chunks, by split.

    The documents, in an order of hashes, fill test, calibration and validation one after the other; a document belongs to
    one split and gives it ``per_document`` chunks at most, spread over its length. All others are for training. A chunk
    that was there before is dropped, so that no chunk is in two splits.
    """
    order = iter(sorted(task.source.documents(), key=lambda document: fingerprint(f"{task.name} {document.name}")))
    seen: set[str] = set()
    found: dict[str, list[str]] = {}

    def new(text: str, limit: int) -> list[str]:
        fresh = [chunk for chunk in dict.fromkeys(chunks(text, task.chunk_bytes))
                 if len(chunk.encode()) >= MIN_BYTES and chunk not in seen]  # fmt: skip
        taken = fresh if len(fresh) <= limit else [fresh[place * len(fresh) // limit] for place in range(limit)]
        seen.update(fresh)
        return taken

    for split in ("test", "calibration", "validation"):
        found[split] = []
        while len(found[split]) < SIZES[split]:
            found[split] += new(next(order).text, task.per_document)
        found[split] = found[split][: SIZES[split]]
    found["train"] = [chunk for document in order for chunk in new(document.text, SIZES["train"])][: SIZES["train"]]
    return {
        split: sorted(found[split], key=fingerprint) for split in SPLITS
    }  # sorted by hash: shuffled, the same always
