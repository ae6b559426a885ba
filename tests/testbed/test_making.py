"""What making a testbed has in common: a step, whole files, measures by hand, hashes for sha256sum, a command line."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from adamerge.testbed.making import LAMBDAS, descend, run, save, summary, write_sums


def test_a_step_is_of_the_clipped_gradient_at_the_given_rate():
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([parameter], lr=100.0)
    parameter.grad = torch.tensor([1e6, 1e6])  # of an earlier step
    assert descend((parameter**2).sum(), [parameter], optimizer, 0.5) == 25
    assert torch.allclose(parameter, torch.tensor([2.7, 3.6]), rtol=1e-5)  # (6, 8) is cut to a norm of 1


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    file = tmp_path / "base.pt"
    save({"a": 1}, file)

    def killed(value, stage):
        Path(stage).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save({"a": 2}, file)
    assert torch.load(file) == {"a": 1}


@pytest.mark.parametrize(("choose", "best"), [(max, 0.5), (min, 0.0)])
def test_the_summary_by_hand(choose, best):
    curve = {0.0: {"a": 10.0, "b": 20.0}, 0.5: {"a": 50.0, "b": 30.127}, 1.0: {"a": 40.0, "b": 20.0}}
    found = summary({"a": 90.0, "b": 70.0}, curve, choose, 1, everywhere="x")
    assert found["pretrained"] == curve[0.0] and found["task_arithmetic"] == curve[best] and found["everywhere"] == "x"
    assert found["best_lambda"] == best
    assert found["task_arithmetic_curve"] == {"0.00": 15.0, "0.50": 40.1, "1.00": 30.0}
    means = {0.0: 15.0, 0.5: 40.0635}
    assert found["averages"] == {"pretrained": 15.0, "task_arithmetic": means[best], "individual": 80.0}
    assert LAMBDAS[0] == 0 and LAMBDAS[6] == 0.3 and LAMBDAS[-1] == 1


def test_hashes_are_those_that_sha256sum_checks(tmp_path):
    (tmp_path / "experts").mkdir()
    files = [tmp_path / "experts" / "b", tmp_path / "a"]
    for file in files:
        file.write_text(file.name)
    write_sums(tmp_path, files)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)
    assert [line.split()[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()] == ["a", "experts/b"]


@dataclass(frozen=True)
class Recipe:
    steps: int = 5
    lr: float = 0.1


def test_the_command_line_is_the_recipe(tmp_path, monkeypatch, capsys):
    made = []

    def make(out, recipe):
        made.append((out, recipe, torch.get_num_threads()))
        return {"averages": {"individual": 1.5}, "rest": 1}

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["make", "--out", str(tmp_path), "--steps", "7", "--threads", "1"])
    try:
        run("a testbed", Recipe(), make)
    finally:
        torch.set_num_threads(threads)
    assert made == [(tmp_path, Recipe(steps=7), 1)]
    assert json.loads(capsys.readouterr().out) == {"individual": 1.5}
