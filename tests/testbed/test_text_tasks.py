"""The testbed's text tasks: splits that share no text, the promised sizes, the same texts every time."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest

from adamerge.testbed import text_tasks
from adamerge.testbed.text_sources import Example, Translations
from adamerge.testbed.text_tasks import TEXT_TASKS, TextTask, base_folder, load_text_task, task_texts

# Those read hundreds of source files of every package first.
READS_SOURCES = ("libraries", "roles", "errors")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in READS_SOURCES else name for name in TEXT_TASKS]
SPLITS = ("train", "calibration", "validation", "test")
AT_LEAST = {"train": 1800, "calibration": 600, "validation": 250, "test": 1000}


@cache
def drawn(name: str):
    return task_texts(TEXT_TASKS[name])


class Fixed:
    def __init__(self, examples):
        self.given = examples

    def examples(self):
        yield from self.given


def toy(examples, length=(1, 99)):
    return TextTask("toy", ("a", "b"), ("{}",), Fixed(examples), "", length)


def everything(splits):
    return {text: label for texts, labels in splits.values() for text, label in zip(texts, labels, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_in_two_splits_or_twice_in_one(name):
    texts = [" ".join(text.lower().split()) for texts, _ in drawn(name).values() for text in texts]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_classes(name):
    task = TEXT_TASKS[name]
    for split, (texts, labels) in drawn(name).items():
        assert len(texts) == len(labels) >= AT_LEAST[split]
        assert set(labels) == set(range(len(task.classnames)))
        assert all(task.length[0] <= len(text) <= task.length[1] for text in texts)
        if split in ("validation", "test"):
            assert max(Counter(labels).values()) / len(labels) < 0.25  # no task is mostly one class


@pytest.mark.slow
def test_a_text_is_in_the_same_split_in_all_tasks():
    where: dict[str, set[str]] = {}
    for name in set(TEXT_TASKS) - {"languages"}:  # whose splits go by the message that is translated
        for split, (texts, _) in drawn(name).items():
            for text in texts:
                where.setdefault(text.lower(), set()).add(split)
    assert all(len(splits) == 1 for splits in where.values())


def test_no_message_is_in_two_splits_in_two_languages():
    source = TEXT_TASKS["languages"].source
    assert isinstance(source, Translations)
    keys: dict[str, set[str]] = {}
    for text, _, key in source.examples():
        keys.setdefault(" ".join(text.split()), set()).add(key)
    of_split = {
        split: {key for text in texts if len(keys[text]) == 1 for key in keys[text]}
        for split, (texts, _) in drawn("languages").items()
    }
    assert of_split["test"] and not of_split["test"] & (of_split["train"] | of_split["calibration"])


def test_a_text_with_two_labels_is_left_out():
    splits = task_texts(toy([Example("One", 0), Example("one ", 1), Example("two", 1), Example("Two", 1)]))
    assert everything(splits) == {"two": 1}


def test_too_short_too_long_and_wordless_texts_are_left_out():
    splits = task_texts(toy([Example(text, 0) for text in ("ab", "abc", "a  b", "abcdef", "12345")], length=(3, 5)))
    assert set(everything(splits)) == {"abc", "a b"}


def test_texts_of_one_key_stay_together():
    splits = task_texts(toy([Example(f"{key} {n}", n % 2, key) for key in "abcdefghij" for n in range(6)]))
    for key in "abcdefghij":
        assert sum(any(text.startswith(key) for text in texts) for texts, _ in splits.values()) == 1
    assert sum(len(texts) for texts, _ in splits.values()) == 60


def test_classes_are_as_even_as_they_can_be(monkeypatch):
    monkeypatch.setattr(text_tasks, "SIZES", dict.fromkeys(SPLITS, 20))
    splits = task_texts(
        toy([Example(f"many {n}", 0) for n in range(900)] + [Example(f"few {n}", 1) for n in range(20)])
    )
    for texts, labels in splits.values():
        few = labels.count(1)
        assert len(texts) == 20 and few <= 10 and labels.count(0) == 20 - few
    assert sum(labels.count(1) for _, labels in splits.values()) == 20  # all of them, as no split has ten to give away


def test_more_texts_move_none_to_another_split():
    fewer = task_texts(toy([Example(f"text {n}", n % 2) for n in range(0, 300, 3)]))
    more = task_texts(toy([Example(f"text {n}", n % 2) for n in range(300)]))
    for split in SPLITS:
        assert set(fewer[split][0]) <= set(more[split][0])


def test_names_are_unique_and_templates_take_one_name():
    assert len(TEXT_TASKS) >= 6
    for name, task in TEXT_TASKS.items():
        assert name == task.name
        assert len(set(task.classnames)) == len(task.classnames)
        assert all(template.count("{}") == 1 for template in task.templates)


def test_loaded_data_are_the_drawn_ones_and_the_second_call_reads_the_cache(tmp_path):
    data = load_text_task("symbols", tmp_path)
    assert tuple(data) == SPLITS
    assert data["test"].column_names == ["text", "label"]
    assert data["test"].features["label"].names == list(TEXT_TASKS["symbols"].classnames)
    texts, labels = drawn("symbols")["test"]
    assert data["test"]["text"][:] == texts and data["test"]["label"][:] == labels
    (folder,) = tmp_path.iterdir()  # the stage was renamed, nothing else is left
    made = folder.stat().st_mtime_ns
    assert load_text_task("symbols", tmp_path)["test"]["text"][:] == texts
    assert folder.stat().st_mtime_ns == made


def test_the_same_texts_under_another_hash_seed():
    code = (
        "import hashlib, json; from adamerge.testbed.text_tasks import TEXT_TASKS, task_texts\n"
        "for name in ('code', 'symbols'):\n"
        "    print(hashlib.sha256(json.dumps(task_texts(TEXT_TASKS[name])).encode()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [hashlib.sha256(json.dumps(drawn(name)).encode()).hexdigest() for name in ("code", "symbols")]
    assert run.stdout.split() == here


def test_an_unknown_task_says_which_there_are():
    with pytest.raises(KeyError, match="languages"):
        load_text_task("poems")


def test_the_base_is_the_installed_one():
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in base_folder().iterdir()}
