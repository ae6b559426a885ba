"""Kept scores: a model is scored once, and again when anything that its scores depend on is another."""

import datasets
import pytest
import torch

from adamerge.data import Vocabulary
from adamerge.data.metrics import Accuracy
from adamerge.runs.kept_scores import KeptScores


class Data:
    """Two tasks whose rows can be changed."""

    metric = Accuracy()

    def __init__(self, **rows):
        self.tasks = {task: Vocabulary(("x", "y"), ("{}",)) for task in ("a", "b")}
        self._rows = {"a": ["u", "v"], "b": ["w"], **rows}

    def rows(self, task, split):
        columns = {"text": self._rows[task], "label": [len(split)] * len(self._rows[task])}
        return datasets.Dataset.from_dict(columns)

    def columns(self, task):
        return ("text",)

    def label_column(self, task):
        return "label"

    def skipped(self, split):
        return {"a": 3}


class Scorer:
    """Counts how often it is asked."""

    def __init__(self, data=None, split="test"):
        self.data, self.split, self.confusions, self.calls = data or Data(), split, {}, 0

    def score(self):
        self.calls += 1
        self.confusions = {"a": torch.eye(2, dtype=torch.int64) * self.calls}
        return {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.5])}


@pytest.fixture
def asked(tmp_path):
    """How often a model is scored that a file may hold already."""

    def ask(scorer=None, model="m", **of):
        scorer = scorer or Scorer()
        kept = KeptScores(tmp_path, scorer, {"backbone": "net"} | of)
        scores = kept.of({"coefficients": model}, scorer.score)
        assert scores["a"].tolist() == [1, 0] and scores["b"].tolist() == [0.5]
        assert torch.equal(scorer.confusions["a"], torch.eye(2, dtype=torch.int64)) and kept.skipped == {"a": 3}
        return scorer.calls

    return ask


def test_once_and_not_again(asked):
    assert [asked(), asked()] == [1, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"backbone": "larger"},
        {"spoiled": "Noise(deviation=0.1)"},
        {"scorer": Scorer(split="validation")},
        {"scorer": Scorer(Data(b=["changed"]))},
    ],
    ids=["model", "backbone", "spoiled", "split", "rows"],
)
def test_another_of_these_is_another_score(change, asked):
    assert asked() == 1
    assert asked(**change) == 1 and asked() == 0


def test_other_labels_and_other_words_are_other_scores(asked, monkeypatch):
    assert asked() == 1
    renamed = Data()
    renamed.tasks = {task: Vocabulary(("y", "x"), ("{}",)) for task in renamed.tasks}
    assert asked(scorer=Scorer(renamed)) == 1
    relabelled = Data()
    rows = relabelled.rows("b", "test").map(lambda row: {"label": row["label"] + 1})
    own = relabelled.rows
    monkeypatch.setattr(relabelled, "rows", lambda task, split: rows if task == "b" else own(task, split))
    assert asked(scorer=Scorer(relabelled)) == 1


def test_a_damaged_file_is_scored_again(asked, tmp_path):
    assert asked() == 1
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    assert [asked(), asked()] == [1, 0]
