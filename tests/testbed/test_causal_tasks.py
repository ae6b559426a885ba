"""The domains of text: splits that share no document and no chunk, the promised sizes, the same texts every time."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

import pytest

from adamerge.testbed import causal_tasks
from adamerge.testbed.causal_sources import Document
from adamerge.testbed.causal_tasks import (
    CAUSAL_TASKS,
    MIN_BYTES,
    SIZES,
    SPLITS,
    CausalTask,
    load_causal_task,
    task_texts,
)

AT_LEAST = {"train": 1000, "calibration": 300, "validation": 150, "test": 400}


@cache
def texts(name: str):
    return task_texts(CAUSAL_TASKS[name])


@dataclass
class Numbered:
    """Documents that repeat their number, and a line that all of them have."""

    count: int
    distributions: tuple[str, ...] = ("torch",)

    def documents(self):
        own = [[f"{number:04d} line {line} {'.' * 80}" for line in range(5)] for number in range(self.count)]
        return [Document(f"{number:04d}", "\n".join(["shared " * 15, *lines])) for number, lines in enumerate(own)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(causal_tasks, "SIZES", {"train": 30, "calibration": 6, "validation": 4, "test": 7})
    return CausalTask("numbers", "numbered lines", Numbered(40), chunk_bytes=120, per_document=3)


@pytest.mark.parametrize("name", CAUSAL_TASKS)
def test_no_chunk_is_in_two_splits_or_twice_in_one(name):
    found = [chunk for split in texts(name).values() for chunk in split]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", CAUSAL_TASKS)
def test_sizes(name):
    assert tuple(texts(name)) == SPLITS
    for split, found in texts(name).items():
        assert AT_LEAST[split] <= len(found) <= SIZES[split]
        assert all(MIN_BYTES <= len(chunk.encode()) <= CAUSAL_TASKS[name].chunk_bytes for chunk in found)


def test_names_are_unique_and_the_domains_differ():
    assert len(CAUSAL_TASKS) >= 4 and all(name == task.name for name, task in CAUSAL_TASKS.items())
    everything = [chunk for name in CAUSAL_TASKS for split in texts(name).values() for chunk in split]
    assert len(set(everything)) == len(everything)


def test_no_document_is_in_two_splits(small):
    """Each chunk of the numbered documents begins with its document's number, but for the shared one."""
    found = task_texts(small)
    owners = {
        split: {chunk[:4] for chunk in chunks if not chunk.startswith("shared")} for split, chunks in found.items()
    }
    assert sum(map(len, owners.values())) == len(set.union(*owners.values())) > 12
    assert [len(found[split]) for split in SPLITS] == [30, 6, 4, 7]
    assert [sum(chunk.startswith("shared") for chunk in found[split]) for split in SPLITS] == [0, 0, 0, 1]
    for split in ("calibration", "validation", "test"):
        numbers = [chunk[:4] for chunk in found[split]]
        assert max(map(numbers.count, numbers)) <= 3


def test_what_a_document_gives_is_spread_over_it(small):
    """Five or six chunks, three taken: places 0, 1 or 2, and 3 or 4; never just the first three."""
    lines = [
        [int(chunk[10]) for chunk in task_texts(small)[split] if not chunk.startswith("shared")] for split in SPLITS[1:]
    ]
    assert max(max(places) for places in lines) >= 3


def test_the_order_says_nothing():
    """A prefix must not be one document: ``calibration_samples`` and the first batches take one."""
    found = texts("romance")["calibration"]
    assert found != sorted(found)
    french = [" le " in chunk or " la " in chunk or " les " in chunk for chunk in found]
    assert 0 < sum(french[:40]) < 40


def test_loaded_data_are_the_cut_ones_and_the_second_call_reads_the_cache(tmp_path, monkeypatch):
    data = load_causal_task("romance", tmp_path)
    assert tuple(data) == SPLITS and data["test"].column_names == ["text"]
    assert {split: data[split]["text"][:] for split in SPLITS} == texts("romance")
    (folder,) = tmp_path.iterdir()  # the stage was renamed, nothing else is left
    made = folder.stat().st_mtime_ns
    assert load_causal_task("romance", tmp_path)["test"][7]["text"] == texts("romance")["test"][7]
    assert folder.stat().st_mtime_ns == made
    monkeypatch.setattr(causal_tasks, "versions", lambda source: "another version")
    load_causal_task("romance", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "other packages are other data"


def test_the_same_texts_under_another_hash_seed():
    code = (
        "import hashlib; from adamerge.testbed.causal_tasks import CAUSAL_TASKS, task_texts\n"
        "for task in CAUSAL_TASKS.values():\n"
        "    print(hashlib.sha256(repr(task_texts(task)).encode()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [hashlib.sha256(repr(texts(name)).encode()).hexdigest() for name in CAUSAL_TASKS]


def test_an_unknown_task_says_which_there_are():
    with pytest.raises(KeyError, match="romance"):
        load_causal_task("verse")
