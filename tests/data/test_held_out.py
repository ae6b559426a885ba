"""Held-out inputs: how many and which, that no step sees them, that they are read as the others, and who tells of them."""

import json

import datasets
import pytest
import torch
from toy_points import TASKS, ToyClassifier, ToyPoints

from adamerge.data import LanguageCalibration, LanguageTask
from adamerge.data.batch_order import Steps
from adamerge.data.calibration_rows import sizes
from adamerge.data.held_out import divided
from adamerge.data.overlap import contents, overlap
from adamerge.errors import ConfigError, DataError


def rows_of(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"number": list(range(count))})


@pytest.mark.parametrize(
    ("rows", "share", "held"),
    [(2, 0.1, 1), (9, 0.1, 4), (63, 0.1, 31), (64, 0.1, 32), (300, 0.1, 32), (600, 0.1, 60), (600, 0.25, 150)],
)
def test_a_share_at_least_32_at_most_half(rows, share, held):
    parts = divided(rows_of(rows), share, "a", seed=1)
    own, out = list(parts["calibration"]["number"]), list(parts["held_out"]["number"])
    assert len(out) == held and sorted(own + out) == list(range(rows))
    assert own == sorted(own) and out == sorted(out), "each in the order of before"


def test_the_draw_follows_the_seed():
    first, again, other = (list(divided(rows_of(90), 0.1, "a", seed)["held_out"]["number"]) for seed in (1, 1, 2))
    assert first == again != other and first != list(range(32)), "and is no stretch of the rows"


def test_none_are_held_out_unless_it_is_asked_for():
    rows = rows_of(40)
    assert divided(rows, 0.0, "a", 0)["calibration"] is rows
    data = ToyPoints()
    data.serve(ToyClassifier())
    assert len(data.samples("one", "calibration")) == 40 and "held_out_samples" not in data.protocol
    with pytest.raises(DataError, match="held_out split is missing"):
        data.rows("one", "held_out")


def test_a_single_input_cannot_be_divided():
    with pytest.raises(DataError, match="task 'cars': none of its calibration inputs can be held out"):
        divided(rows_of(1), 0.1, "cars", 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": -0.1}, "held_out must be from 0 to 0.5"),
        ({"held_out": 0.6}, "held_out must be from 0 to 0.5"),
        ({"held_out": 0.1, "shots": 2, "labelled": True}, "of few samples of each class none are held out"),
    ],
)
def test_shares_out_of_range_and_shots_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ToyPoints(**settings)


def points(rows):
    return {tuple(row) for row in rows["point"][:]}


@pytest.mark.parametrize("settings", [{}, {"transductive": True}, {"calibration_samples": 50}], ids=str)
def test_no_step_sees_them(settings):
    data, whole = ToyPoints(rows=80, held_out=0.1, **settings), ToyPoints(rows=80, **settings)
    data.serve(ToyClassifier())
    for task in TASKS:
        held, rest = points(data.rows(task, "held_out")), points(data.rows(task, "calibration"))
        assert not held & rest and held | rest == points(whole.rows(task, "calibration"))
        assert len(held) == (25 if settings.get("calibration_samples") else 32)
        steps = Steps({task: data.samples(task, "calibration")}, None, batch_size=8, seed=0, total=30)
        seen = {tuple(point) for step in range(30) for point in steps[step][task].inputs.tolist()}
        assert seen == {tuple(torch.tensor(point).tolist()) for point in rest}


def test_summary_check_and_fit_tell_of_them():
    data = ToyPoints(rows=80, held_out=0.1)
    assert data.protocol["held_out_samples"] == {"one": 32, "two": 32}
    assert data.protocol["calibration_samples"] == {"one": 48, "two": 48}
    assert sizes(data, "one").startswith("calibration 80 (32 held out), ")
    assert sizes(ToyPoints(rows=80, held_out=0.1, calibration_samples=50), "one").startswith(
        "calibration 80 (50 of them used; 25 held out), "
    )


def test_what_is_held_out_is_calibration_data_to_whoever_compares():
    """A scored sample that was held out has had a part in the result, and other held-out inputs are other data."""
    plain, held = ToyPoints(rows=80, transductive=True), ToyPoints(rows=80, transductive=True, held_out=0.25)
    assert overlap(plain, "test") == overlap(held, "test") == {"one": 80, "two": 80}
    assert contents(plain) != contents(held) != contents(ToyPoints(rows=80, transductive=True, held_out=0.5))


def test_a_response_is_read_of_neither(tmp_path):
    """A language task's response is a label: what is held out is its prompt alone, as of the other inputs."""
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"question {i}", "a": f"answer {i}"}) for i in range(40)))
    task = LanguageTask(str(path), text="{q}", response="{a}")
    data = LanguageCalibration(tasks={"one": task}, calibration_fraction=0.5, held_out=0.1)

    class Reader(ToyClassifier):
        read: list = []

        def preprocess(self, sample):
            self.read.append(sample)
            return torch.zeros(1)

    data.serve(Reader())
    data.samples("one", "held_out")
    assert len(Reader.read) == 10 and all(text.startswith("question") for text in Reader.read)
