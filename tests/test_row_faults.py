"""Rows and words that a fit cannot use: known before anything is written, or skipped and told; never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import CLASSES, noise_images
from running import command, fit_words, pool_config, same_coefficients, without_pictures, write_yaml

VALIDATED = "--trainer.limit_val_batches=1.0"


class Place:
    """A pool whose task 'colours' has these splits."""

    def __init__(self, folder: Path, pool: Any, images: Any) -> None:
        self.folder, self.config = folder, pool_config(pool, images)
        self.task = self.config["data"]["init_args"]["tasks"]["colours"]
        self.task["classnames"] = CLASSES["colours"]
        names = enumerate(("calibration", "validation", "test"))
        self.splits = {name: self.plain(noise_images(CLASSES["colours"], 40, seed)) for seed, name in names}

    @staticmethod
    def plain(rows: datasets.Dataset) -> datasets.Dataset:
        """With numbers for labels, which name no classes."""
        return rows.cast_column("label", datasets.Value("int64"))

    def relabel(self, split: str, labels: list[Any]) -> None:
        rows = self.splits[split].remove_columns("label")
        self.splits[split] = rows.add_column("label", labels)

    def break_picture(self, split: str, *numbers: int) -> None:
        stored = self.splits[split].cast_column("image", datasets.Image(decode=False))
        rows = [dict(row) for row in stored]
        for number in numbers:
            rows[number]["image"] = {"bytes": b"not a picture", "path": f"{number}.png"}
        columns = {key: [row[key] for row in rows] for key in ("image", "label")}
        self.splits[split] = datasets.Dataset.from_dict(columns, self.splits[split].features)

    def write(self, name: str = "pool") -> Path:
        self.task["dataset"] = str(self.folder / name)
        datasets.DatasetDict(self.splits).save_to_disk(self.task["dataset"])
        return write_yaml(self.folder / f"{name}.yaml", self.config)


@pytest.fixture
def place(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    return Place(tmp_path, pool, image_folders)


WORDS = [CLASSES["colours"][n % 3] for n in range(40)]
BAD_LABELS = {
    "words": (["cow", *WORDS[1:]], "'cow' in row 0"),
    "another case": ([*WORDS[:39], "Red"], "'Red' in row 39"),
    "digits": (["1"] * 40, "'1' in row 0"),
    "lists": ([[n % 3] for n in range(40)], "[0] in row 0"),
    "fractions": ([0.5, 1.5] * 20, "0.5 in row 0"),
    "null": ([n % 3 if n != 5 else None for n in range(40)], "None in row 5"),
    "from one": ([1 + n % 3 for n in range(40)], "3 in row 2"),
    "beyond": ([n % 3 if n != 7 else 300 for n in range(40)], "300 in row 7"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_are_no_classes_end_a_fit_that_scores_by_them_before_it_begins(kind, place, capfd):
    labels, told = BAD_LABELS[kind]
    place.relabel("validation", labels)
    outcome = command(capfd, "fit", *fit_words(place.write(), VALIDATED))
    assert outcome.code == 3 and not Path("runs").exists(), outcome.err[-3000:]
    first = (
        f"error: task 'colours', validation split: column 'label' holds {told} (counted from 0) of split 'validation'"
    )
    assert outcome.error.startswith(first) and "'red', 'green', 'blue'" in outcome.err
    assert outcome.err.rstrip().endswith("; or let the fit score nothing: trainer.limit_val_batches=0")
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_class_names_as_labels_are_the_numbers(place, capfd):
    """The same coefficients and the same scores, to the bit."""
    runs = []
    for kind, labels in (("numbers", [n % 3 for n in range(40)]), ("names", WORDS)):
        for split in ("calibration", "validation"):
            place.relabel(split, labels)
        outcome = command(capfd, "fit", *fit_words(place.write(kind), VALIDATED, f"--id={kind}", "--name=x"))
        assert outcome.code == 0, outcome.err[-3000:]
        runs.append(Path("runs/x") / kind)
    assert same_coefficients(*runs)
    one, other = (json.loads((run / "summary.json").read_text())["metrics"] for run in runs)
    assert one == other and "validation/accuracy/colours" in one


@pytest.mark.slow
@pytest.mark.parametrize("split", ["calibration", "test"])
def test_labels_that_a_fit_does_not_read_change_and_stop_nothing(split, place, capfd):
    """Of the calibration split they are never read; of the test split they are told, and refused where they are scored."""
    for name in ("right", "wrong"):
        if name == "wrong":
            place.relabel(split, BAD_LABELS["words"][0])
        outcome = command(capfd, "fit", *fit_words(place.write(name), VALIDATED, f"--id={name}", "--name=x"))
        assert outcome.code == 0, outcome.err[-3000:]
        told = "task 'colours', test split: column 'label' holds 'cow' in row 0 (counted from 0) of split 'test'"
        assert (told in outcome.out) is (name == "wrong" and split == "test")
    assert same_coefficients(Path("runs/x/right"), Path("runs/x/wrong"))
    outcome = command(capfd, "test", "runs/x/wrong")
    assert outcome.code == (3 if split == "test" else 0)
    assert split == "calibration" or told in outcome.error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"templates": ["a {classname}"]}, "the template 'a {classname}' cannot be filled ('classname')"),
        ({"templates": ["{0} {1}"]}, "the template '{0} {1}' cannot be filled"),
        ({"templates": ["{} and {}"]}, "the template '{} and {}' cannot be filled"),
        ({"templates": ["a {}", "a {"]}, "the template 'a {' cannot be filled"),
        ({"templates": ["a photo"]}, "the template 'a photo' has no place for the class name"),
        ({"templates": ["{.upper}"]}, "the template '{.upper}' has no place for the class name"),
        ({"templates": []}, "no templates"),
        ({"classnames": ["red", "red", "red"]}, "labels 0, 1, 2 have the same class name 'red'"),
        ({"classnames": ["red", "blue", "red"]}, "labels 0, 2 have the same class name 'red'"),
        ({"classnames": ["red", "", "blue"]}, "the class name of label 1 is empty"),
    ],
)
def test_words_of_no_use_are_refused_before_anything_is_written(words, told, place, capfd):
    place.task |= words
    outcome = command(capfd, "fit", *fit_words(place.write()))
    assert outcome.code == (3 if words.get("templates") == [] else 2) and not Path("runs").exists()
    assert told in outcome.error and "Traceback" not in outcome.err
    assert place.task["dataset"] in outcome.error or "task 'colours'" in outcome.error


def test_broken_pictures_are_told_and_counted_and_a_resumed_fit_draws_the_same(place, capfd):
    place.break_picture("calibration", 3, 20)
    place.break_picture("validation", 7)
    place.break_picture("test", 30)
    file = place.write()
    few = "--data.unusable_share=0.04"
    outcome = command(capfd, "fit", *fit_words(file, few))
    assert outcome.code == 3 and not Path("runs").exists()
    assert (
        "task 'colours', calibration split: 2 of the first 21 of 40 rows cannot be used; first row 3 " in outcome.error
    )
    assert "picture 3.png: cannot identify image file" in outcome.error and " at 0x" not in outcome.err

    words = fit_words(file, VALIDATED, "--id=a", "--name=x", steps=6)
    outcome = command(capfd, "fit", *words)
    assert outcome.code == 0, outcome.err[-3000:]
    for told in (
        "2 of 40 rows of the calibration split cannot be used and are skipped; row 3 ",
        "1 of 40 rows of the valid",
    ):
        assert f"task 'colours': {told}" in outcome.out
    run = Path("runs/x/a")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["protocol"]["skipped_rows"] == {"colours": 2}
    assert summary["protocol"]["calibration_samples"]["colours"] == 38

    for path in (run / "checkpoints").glob("*"):  # as if it had ended after three steps
        if path.name != "step=3.ckpt":
            path.unlink()
    (run / "coefficients.safetensors").rename(run / "whole.safetensors")
    summary["status"] = "running"
    (run / "summary.json").write_text(json.dumps(summary))
    outcome = command(capfd, "fit", "--resume", run)
    assert outcome.code == 0, outcome.err[-3000:]
    assert (run / "coefficients.safetensors").read_bytes() == (run / "whole.safetensors").read_bytes()

    with pytest.warns(match="1 of 40 rows of the test split cannot be used and are skipped; row 30 "):
        assert command(capfd, "test", run).code == 0
    scored = json.loads((run / "summary.json").read_text())["test"]
    assert scored["skipped_rows"] == {"colours": 1} and scored["warnings"] == []
