"""A run with a solver: task vectors and coefficients in its folder, which exports wherever it was moved."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from running import child, command, environment, pool_config, without_pictures, write_yaml
from safetensors.torch import load_file, save_file

from adamerge.artifacts.coefficients import load_coefficients
from adamerge.artifacts.export import export_from
from adamerge.errors import CheckpointError, CoefficientsError
from adamerge.io.coefficient_file import read_coefficients
from adamerge.runs.stages import fit
from adamerge.solvers import Wudi
from adamerge.task_vectors.task_vectors import TaskVectors

FILE = Path("task_vectors/merged.safetensors")
WUDI = {"model": {"solver": {"class_path": "adamerge.Wudi", "init_args": {"ridge": 0.5, "vector_scale": 0.4}}}}


@pytest.fixture
def method(tmp_path):
    return write_yaml(tmp_path / "methods" / "wudi.yaml", WUDI)


@pytest.fixture
def staged(tmp_path):
    """A solver, and then half of its vector beside an expert's, by another parametrization."""
    folder = tmp_path / "methods" / "staged"
    write_yaml(folder / "1_solve.yaml", WUDI)
    parametrization = {"class_path": "adamerge.LayerWise", "init_args": {"init": 0.5}}
    second = {"parametrization": parametrization, "task_vectors": {"experts": {"colours": "{task_vectors}"}}}
    write_yaml(folder / "2_weigh.yaml", {"model": second})
    return folder


def solved_by_hand(pool):
    vectors, solver = TaskVectors(**pool), Wudi(0.5, 0.4)
    return {name: solver.solve(name, vectors) for name in vectors}


def same(one, other):
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_a_run_holds_the_vectors_and_what_merges_them(pool, pool_file, method, capfd):
    outcome = command(capfd, "fit", pool_file, method, "--id=a")
    assert outcome.code == 0, outcome.err[-3000:]
    run, expected = Path("runs/tiny-wudi/a"), solved_by_hand(pool)
    written = load_file(run / FILE)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    metadata, sections = read_coefficients(run)
    assert metadata["start"]["source"] == f"run:{FILE.as_posix()}" and metadata["rows"] == [*pool["experts"]]
    assert sections["w"] == {} and metadata["parametrization"]["class_path"] == "adamerge.StartAlone"
    told = summary(run)
    assert told["status"] == "finished" and 0 < told["seconds"] < 60
    assert told["solver"] == {"class_path": "adamerge.Wudi", "init_args": {"ridge": 0.5, "vector_scale": 0.4}}
    base = load_file(Path(pool["base"]) / "open_clip_model.safetensors")
    export_from(run / "coefficients.safetensors", "merged")
    for name, value in load_file("merged/open_clip_model.safetensors").items():
        assert torch.equal(value, base[name] + expected[name] if name in expected else base[name]), name
    card = Path("merged/README.md").read_text()
    assert "task vectors by adamerge.Wudi" in card and "no data were used" in card
    outcome = command(capfd, "test", run)
    assert outcome.code == 0 and "average" in outcome.out and summary(run)["test"]["average"] > 0


def test_settings_of_the_solver_and_the_vectors_strength_are_overrides(pool_file, method, tmp_path):
    words = [str(pool_file), str(method)]
    plain = fit([*words, "--id=a"])
    other = fit([*words, "--model.solver.ridge=3", "--id=b"])
    assert not same(plain / FILE, other / FILE)
    assert summary(other)["solver"]["init_args"]["ridge"] == 3
    scaled = {"class_path": "adamerge.Scaled", "init_args": {"scale": 0.5, "solver": WUDI["model"]["solver"]}}
    half = fit([str(pool_file), str(write_yaml(tmp_path / "half.yaml", {"model": {"solver": scaled}})), "--id=d"])
    assert summary(half)["solver"] == scaled
    full = load_file(plain / FILE)
    assert all(torch.equal(value, 0.5 * full[name]) for name, value in load_file(half / FILE).items())
    assert same(fit([*words, "--id=c"]) / FILE, plain / FILE), "runs of one process leave nothing to one another"


@pytest.mark.parametrize("kind", ["plain", "staged"])
def test_a_run_that_was_moved_exports(kind, pool_file, method, staged, capfd):
    run = fit([str(pool_file), str(method if kind == "plain" else staged), "--id=a"])
    export_from(run, "here")
    shutil.move(run, "elsewhere")
    shutil.rmtree("runs")
    assert command(capfd, "export", "elsewhere", "there").code == 0
    assert same("here/open_clip_model.safetensors", "there/open_clip_model.safetensors")
    if kind == "staged":
        assert command(capfd, "export", "elsewhere/1_solve", "first").code == 0
        assert command(capfd, "export", "elsewhere/2_weigh/coefficients.safetensors", "second").code == 0
        assert same("here/open_clip_model.safetensors", "second/open_clip_model.safetensors")


def test_a_file_apart_from_its_run_says_what_it_misses(pool_file, method):
    run = fit([str(pool_file), str(method), "--id=a"])
    shutil.copy(run / "coefficients.safetensors", "alone.safetensors")
    with pytest.raises(CoefficientsError, match="the start is not there.*task_vectors/merged.safetensors"):
        load_coefficients("alone.safetensors")
    again = load_coefficients("alone.safetensors", start=str(run / FILE))
    assert again.task_vectors.start is not None


def test_a_later_stage_takes_the_vectors_as_deltas_and_they_are_solved_once(pool, pool_file, staged, monkeypatch):
    run = fit([str(pool_file), str(staged), "--id=a"])
    source = read_coefficients(run)[0]["experts"]["colours"]["source"]
    assert source == f"run:1_solve/{FILE.as_posix()}"
    assert (run / "coefficients.safetensors").read_bytes() == (run / "2_weigh/coefficients.safetensors").read_bytes()
    vectors, expected = load_coefficients(run).task_vectors, solved_by_hand(pool)
    assert all(torch.equal(vectors[name].dense()[0], value) for name, value in expected.items())
    before = (run / "1_solve" / FILE).stat()

    def refuse(self, name, deltas):
        raise AssertionError("solved again")

    monkeypatch.setattr(Wudi, "solve", refuse)
    assert fit([], resume=run) == run and fit([], resume=run / "1_solve") == run / "1_solve"
    after = (run / "1_solve" / FILE).stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


@pytest.mark.parametrize("at", [0, 7])
def test_an_interrupted_solve_goes_on_wherever_its_run_is_now(at, pool_file, method, monkeypatch):
    whole = fit([str(pool_file), str(method), "--id=whole"])
    solve, names = Wudi.solve, []

    def interrupted(self, name, deltas):
        if len(names) == at:
            raise KeyboardInterrupt
        names.append(name)
        return solve(self, name, deltas)

    monkeypatch.setattr(Wudi, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit([str(pool_file), str(method), "--id=cut"])
    run = Path("runs/tiny-wudi/cut").rename("elsewhere")
    assert not (run / FILE).exists() and not (run / "coefficients.safetensors").exists()
    left = []
    monkeypatch.setattr(Wudi, "solve", lambda self, name, deltas: left.append(name) or solve(self, name, deltas))
    fit([], resume=run)
    assert [*names, *left] == list(load_file(whole / FILE)) and len(names) == at
    assert (run / FILE).read_bytes() == (whole / FILE).read_bytes()


KILLED = """
import os, signal, sys
from adamerge.cli import main
from adamerge.solvers import Wudi
plain, done = Wudi.solve, []

def dying(self, name, deltas):
    done.append(name)
    if len(done) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, name, deltas)

Wudi.solve = dying
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_solve_goes_on_to_the_same_bytes(pool_file, method, tmp_path, request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the child has
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    whole = fit([str(pool_file), str(method), "--id=whole"])
    (tmp_path / "killed.py").write_text(KILLED)
    line = [sys.executable, "killed.py", "fit", str(pool_file), str(method), "--id=killed"]
    ended = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    run = Path("runs/tiny-wudi/killed")
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert [path.name[:8] for path in sorted((run / FILE).parent.iterdir())] == [".merged."] * 2
    fit([], resume=run)
    assert (run / FILE).read_bytes() == (whole / FILE).read_bytes()


STRANGER = """
import sys
import open_clip, torch
network = open_clip.create_model("local-dir:merged", require_pretrained=True).eval()
with torch.no_grad():
    torch.save(network.encode_image(torch.load("images.pt")), "features.pt")
assert "adamerge" not in sys.modules
"""


@pytest.mark.slow
def test_the_exported_model_is_the_merged_one_in_a_fresh_process(pool_file, method, tmp_path):
    from adamerge.backbones import OpenClipClassifier
    from adamerge.merging.merged_model import MergedModel

    run = fit([str(pool_file), str(method), "--id=a"])
    export_from(run, "merged")
    coefficients = load_coefficients(run)
    backbone = OpenClipClassifier(coefficients.task_vectors.base.location)
    merged = MergedModel(backbone, coefficients.task_vectors, coefficients.parametrization)
    torch.save(images := torch.randn(5, 3, 16, 16), "images.pt")
    (tmp_path / "stranger.py").write_text(STRANGER)
    ended = child(["stranger.py"], tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            merged.merge()
            own = backbone.network.encode_image(images)
    finally:
        torch.set_num_threads(threads)
    theirs = torch.load("features.pt")
    assert (own - theirs).abs().max() <= 1e-5 * max(1.0, float(own.abs().max()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "truncated"),
        (lambda path: path.write_bytes(b"{}"), "not a safetensors file"),
        (lambda path: save_file({"visual.proj": torch.ones(2, 2)}, path), "holds no task vectors"),
        (lambda path: resaved(path, "visual.proj", torch.full((32, 16), torch.nan)), "NaN or Inf|is not the model"),
        (lambda path: resaved(path, "visual.proj", torch.ones(3, 3)), "has another shape"),
        (lambda path: resaved(path, "visual.other", torch.ones(3)), "the base lacks: 'visual.other'"),
        (lambda path: resaved(path, "visual.proj", torch.ones(32, 16)), "is not the model these coefficients were"),
    ],
)
def test_a_damaged_file_is_refused(damage, words, pool_file, method):
    run = fit([str(pool_file), str(method), "--id=a"])
    damage(run / FILE)
    with pytest.raises((CheckpointError, CoefficientsError), match=words):
        export_from(run, "merged")
    assert not Path("merged").exists()


def resaved(path, name, value):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), name: value}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"objective": "adamerge.Entropy"}, "model.objective does not go with model.solver=Wudi"),
        ({"recalibrate_buffers": True}, "model.recalibrate_buffers does not go with model.solver=Wudi"),
        ({"init_from": "x.safetensors"}, "model.init_from does not go with model.solver=Wudi"),
        ({"parametrization": "adamerge.LayerWise"}, "model.parametrization does not go with model.solver"),
        ({"solver": {"class_path": "adamerge.Wudi", "init_args": {"ridge": -1}}}, "Wudi: ridge must be positive"),
        ({"solver": {"class_path": "adamerge.Wudi", "init_args": {"rigde": 1}}}, "rigde"),
        ({"solver": "adamerge.Ties"}, "model.solver"),
    ],
)
def test_check_refuses_what_fit_refuses(changed, words, pool_file, tmp_path, capfd):
    content = {"model": {**WUDI["model"], **changed}, "trainer": {"max_steps": 2}}
    file = write_yaml(tmp_path / "methods" / "odd.yaml", content)
    errors = []
    for verb in ("check", "fit"):
        outcome = command(capfd, verb, pool_file, file)
        assert outcome.code == 2 and words in outcome.error, outcome.err[-2000:]
        errors.append(outcome.error)
    assert not Path("runs").exists()


def test_vectors_that_no_stage_writes_are_refused_by_every_verb(pool_file, staged, capfd):
    (staged / "1_solve.yaml").write_text(yaml.safe_dump({"model": {"parametrization": "adamerge.TaskWise"}}))
    for verb in ("check", "fit"):
        outcome = command(capfd, verb, pool_file, staged)
        assert outcome.code == 2 and "2_weigh.yaml: {task_vectors} stands for" in outcome.error
    assert not Path("runs").exists()


def test_check_says_what_is_done(pool_file, staged, capfd):
    outcome = command(capfd, "check", pool_file, staged)
    assert outcome.code == 0, outcome.err[-2000:]
    said = " ".join(outcome.out.split())
    assert "Wudi writes one task vector of all experts" in said
    assert "what it takes is known when the stage before it has written its files" in said


def test_no_data_are_opened(pool, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    images = dict.fromkeys(pool["experts"], str(tmp_path / "no_such_images"))
    file = write_yaml(tmp_path / "pool.yaml", pool_config(pool, images))
    assert summary(fit([str(file), str(method), "--id=a"]))["protocol"] == {}


def test_inspect_shows_what_the_file_holds(pool_file, method, capfd):
    run = fit([str(pool_file), str(method), "--id=a"])
    outcome = command(capfd, "inspect", run / FILE)
    assert outcome.code == 0 and "adamerge.Wudi" in outcome.out and "visual.proj" in outcome.out
    assert os.fspath(run) in command(capfd, "inspect", run).out
