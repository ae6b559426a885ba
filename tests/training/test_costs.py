"""Costs: forward passes by kind and by hand, seconds that a resumed fit adds to, scalars and the elements that they merge."""

import json
from pathlib import Path

import torch
from running import METHODS, TASK_ARITHMETIC, command, fit_words
from safetensors import safe_open

from adamerge.runs.fit import fit
from adamerge.training.costs import KINDS, Costs

ALIGNMENT = METHODS / "expert_merging.yaml"
TASKS, SAMPLES, LOOKS, VALIDATION = 2, 4, 3, 6
"""Of the tiny pool, of a batch of one task, looks before the first step that tell which coefficients are held, and samples
of a validation split."""


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def elements(pool) -> int:
    with safe_open(next(iter(pool["experts"].values())), "pt") as file:
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118


def test_passes_and_scalars_by_hand(pool_file, pool):
    run = fit(fit_words(pool_file, "--name=n", "--id=a", "--model.hold=false", steps=5))
    found = summary(run)
    assert found["forward_passes"] == {"merged": 5 * TASKS * SAMPLES, "experts": 0, "validation": 0}
    with safe_open(run / "coefficients.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert found["learned"] == {"scalars": count, "of": elements(pool)}
    assert found["seconds"] > 0 and found["peak_host_bytes"] > 1 << 24


def test_the_first_gradients_are_passes_too(pool_file):
    found = summary(fit(fit_words(pool_file, "--name=n", "--id=a", steps=2)))
    assert found["forward_passes"]["merged"] == (2 + LOOKS) * TASKS * SAMPLES


def test_experts_and_validation_are_counted_apart(pool_file, monkeypatch):
    words = fit_words(pool_file, "--name=n", "--id=a", "--model.hold=false", method=ALIGNMENT, steps=2)
    words = [word for word in words if not word.startswith("--trainer.limit_val_batches")]
    run = fit([*words, "--trainer.val_check_interval=2", "--data.calibration_samples=4"])
    found = summary(run)
    assert found["forward_passes"]["experts"] == TASKS * 4 == sum(found["teachers"]["forwards"].values())
    assert found["forward_passes"]["merged"] == 2 * TASKS * SAMPLES
    assert found["forward_passes"]["validation"] == TASKS * VALIDATION


def test_a_method_that_learns_nothing_takes_no_pass(pool_file, pool):
    found = summary(fit(fit_words(pool_file, "--name=n", "--id=a", method=TASK_ARITHMETIC)))
    assert found["forward_passes"] == dict.fromkeys(KINDS, 0)
    assert found["learned"] == {"scalars": 0, "of": elements(pool)} and found["seconds"] >= 0


def test_a_resumed_fit_adds_to_what_it_took(pool_file, capfd):
    run = fit(fit_words(pool_file, "--name=n", "--id=a", "--model.hold=false", steps=3))
    seconds = summary(run)["seconds"]
    assert command(capfd, "fit", "--resume", run, "--trainer.max_steps=5").code == 0
    found = summary(run)
    assert found["forward_passes"]["merged"] == 5 * TASKS * SAMPLES
    assert found["seconds"] > 0.5 * seconds  # up to the checkpoint that it went on from, which is before the end


def test_state_is_added_to_and_not_begun_anew():
    costs = Costs()
    costs.load_state_dict({"seconds": 100.0, "passes": {"merged": 7, "experts": 0, "validation": 1}})
    assert 100 <= costs.seconds < 101
    assert costs.state_dict()["passes"] == {"merged": 7, "experts": 0, "validation": 1}
