"""Scores of a comparison: the oracle's coefficient is the best on the labels, or the one that was chosen before."""

from pathlib import Path
from types import SimpleNamespace

import torch

from adamerge.data.metrics import Accuracy
from adamerge.runs.comparison_scores import REFERENCES, score_all

SCORES = {0.0: 0.1, 0.3: 0.4, 0.5: 0.6, 1.0: 0.2}


class Kept:
    """Scores nothing, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []
        vectors = SimpleNamespace(fingerprints=dict, include=(), exclude=())
        self.scorer = SimpleNamespace(
            vectors=vectors,
            base=lambda: 0.05,
            experts=lambda: 0.9,
            merged=lambda vectors, made: SCORES[made.keywords["init"]],
            doubts=lambda base, experts: [f"doubt {float(base['a'])} {float(experts['a'])}"],
            data=SimpleNamespace(metric=Accuracy()),
            of=lambda coefficients: 0.7,
        )

    def of(self, model, compute):
        self.asked.append(model)
        return {"a": torch.tensor([compute()], dtype=torch.float64)}


def test_the_best_coefficient_is_the_oracles(tmp_path, monkeypatch):
    (tmp_path / "coefficients.safetensors").write_bytes(b"x")
    monkeypatch.setattr("adamerge.runs.comparison_scores.run_coefficients", lambda run: None)
    kept = Kept()
    found = score_all(kept, kept.scorer.vectors, list(SCORES), {"mine": {"0": tmp_path, "1": tmp_path}})
    assert found.best == 0.5 and list(found.references) == list(REFERENCES)
    assert {name: float(scores["a"]) for name, scores in found.references.items()} == {
        "pretrained": 0.05, "individual": 0.9, "task_arithmetic_0.3": 0.4, "task_arithmetic_tuned": 0.6,
    }  # fmt: skip
    assert {seed: float(scores["a"]) for seed, scores in found.runs["mine"].items()} == {"0": 0.7, "1": 0.7}
    assert found.doubts == ["doubt 0.05 0.9"]
    assert len({str(model) for model in kept.asked}) == 2 + len(SCORES) + 1, "equal files are one model"


def test_spoiled_inputs_choose_nothing(tmp_path: Path):
    kept = Kept()
    found = score_all(kept, kept.scorer.vectors, list(SCORES), {}, best=1.0)
    assert found.best == 1.0 and float(found.references["task_arithmetic_tuned"]["a"]) == 0.2
    assert sorted(model["coefficient"] for model in kept.asked if "coefficient" in model) == [0.3, 1.0]
