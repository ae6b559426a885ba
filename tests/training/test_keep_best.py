"""KeepBest: which step's coefficients are the result, that looking changes nothing, and what a resumed fit chooses."""

import math
from functools import partial

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Trail, descending
from running import command, fit_words, pool_config, without_pictures, write_yaml
from toy_points import QUIET, TASKS, ToyClassifier, ToyPoints, fit_toy, logits_of, vectors_of, weights_of

from adamerge.artifacts.coefficients import read_coefficients
from adamerge.errors import ConfigError
from adamerge.io.untrusted_files import read_json
from adamerge.objectives import CrossEntropy, Entropy
from adamerge.parametrizations import LayerWise
from adamerge.runs.finished_runs import section_of
from adamerge.training import MergingModule
from adamerge.training.keep_best import KeepBest
from adamerge.training.selection import HighestAgreement, HighestScore, LowestTarget, Selection


class Plan(Selection):
    """The k-th look has the k-th value."""

    def __init__(self, *values):
        self.values, self.looks = values, []

    def value(self, look):
        self.looks.append(look)
        return self.values[(len(self.looks) - 1) % len(self.values)]


def module_of(beta=None, lr=0.05, objective=None) -> MergingModule:
    objective = objective if objective is not None else CrossEntropy()
    return descending(
        ToyClassifier(), vectors_of(), partial(LayerWise, init=0.0), objective, lr, task_weights=beta or {}
    )


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ((1, 2, 3, 4), 7),
        ((4, 3, 2, 1), 0),
        ((1, 5, 5, 2), 3),
        ((None, 1, None, 2), 7),
        ((None, 2, 1, None), 3),
        ((math.nan, 1, math.inf, 0), 3),
    ],
)
def test_the_best_step_is_the_result(values, step):
    """Looks before the fit, after steps 3 and 6, and after the last, 7; of equals, the earliest."""
    trail, keep, module = Trail(), KeepBest(Plan(*values), every=3), module_of()
    fit_toy(module, ToyPoints(labelled=True), 7, callbacks=[trail, keep])
    assert torch.equal(module.merged.parametrization.w, trail.w[step])
    found = module.coefficients()
    assert found.step == step and module.global_step == 7
    chosen = found.protocol["selection"]
    assert (chosen["step"], chosen["looks"], chosen["rule"]) == (step, 4, "Plan")
    assert chosen["split"] == "validation, labels read"


def test_without_it_the_last_step_is_the_result():
    module = fit_toy(module_of(), ToyPoints(labelled=True), 3)
    assert module.coefficients().step == 3 and "selection" not in module.coefficients().protocol


def test_where_no_step_may_be_chosen_the_last_one_stands_and_it_is_said():
    trail, module = Trail(), module_of()
    with pytest.warns(UserWarning, match="no step may be chosen"):
        fit_toy(module, ToyPoints(labelled=True), 4, callbacks=[trail, KeepBest(Plan(None), 2)])
    assert torch.equal(module.merged.parametrization.w, trail.w[4])
    assert module.coefficients().protocol["selection"]["step"] is None and module.coefficients().step == 4


def test_looks_are_at_the_validation_split_with_base_and_experts_beside():
    plan, module, data = Plan(1.0), module_of({"two": 0.5}), ToyPoints(labelled=True)
    fit_toy(module, data, 2, callbacks=[KeepBest(plan)])
    base, experts = weights_of()
    for task in TASKS:
        rows = data.rows(task, "validation")
        points, labels = torch.tensor(rows["point"][:]), torch.tensor(rows["label"][:])

        def score(weights, task=task, points=points, labels=labels):
            return float((logits_of(weights, task, points).argmax(1) == labels).double().mean())

        assert plan.looks[0].base[task] == pytest.approx(score(base)) == plan.looks[0].scores[task]
        assert plan.looks[0].experts[task] == pytest.approx(score(experts[task]))
    assert plan.looks[0].weights == {"two": 0.5}
    assert plan.looks[-1].base == plan.looks[0].base


def test_looking_does_not_change_the_fit():
    trails = [Trail(), Trail()]
    fit_toy(module_of(), ToyPoints(labelled=True), 6, callbacks=[trails[0]])
    fit_toy(module_of(), ToyPoints(labelled=True), 6, callbacks=[trails[1], KeepBest(Plan(5, 4, 3), 2)])
    assert all(torch.equal(trails[0].w[step], trails[1].w[step]) for step in range(7))


@pytest.mark.parametrize("stop", [4, 5])
@pytest.mark.parametrize("values", [(1, 9, 3, 4, 5), (1, 2, 3, 9, 5)])
def test_a_resumed_fit_chooses_the_same_step(tmp_path, stop, values):
    """Also when the best step was before the checkpoint, and when the checkpoint is of a step that is looked at."""
    settings = {
        **QUIET,
        "enable_checkpointing": True,
        "max_steps": 8,
        "max_epochs": 1,
        "default_root_dir": str(tmp_path),
    }
    saved = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    whole = module_of()
    Trainer(**settings, callbacks=[KeepBest(Plan(*values), 2), saved]).fit(whole, ToyPoints(labelled=True))
    plan, resumed = Plan(*values), module_of()
    plan.looks = [None] * (1 + stop // 2)
    Trainer(**settings, callbacks=[KeepBest(plan, 2)]).fit(
        resumed, ToyPoints(labelled=True), ckpt_path=tmp_path / "kept" / f"step={stop}.ckpt", weights_only=True
    )
    assert torch.equal(resumed.merged.parametrization.w, whole.merged.parametrization.w)
    assert resumed.coefficients().protocol == whole.coefficients().protocol
    assert resumed.coefficients().step == {1: 2, 3: 6}[values.index(9)]


def test_negation_forgets_the_target_and_keeps_the_control():
    """Ascent on one task; the chosen step holds the bound, and the last one, which goes on, does not."""
    keep = KeepBest(LowestTarget(share=0.95), every=1)
    module, data = module_of({"one": -1.0, "two": 1.0}, lr=0.1), ToyPoints(labelled=True, rows=200)
    trail = Trail()
    fit_toy(module, data, 25, callbacks=[trail, keep])
    chosen = module.coefficients().protocol["selection"]
    base = keep._seen.state_dict()["base"]
    assert chosen["scores"]["two"] >= 0.95 * base["two"] and chosen["scores"]["one"] < 0.8 * base["one"]
    assert 0 < chosen["step"] < 25
    last, _ = scores_of(trail.w[25], data)
    assert last["two"] < 0.95 * base["two"] and last["one"] < chosen["scores"]["one"], "without the bound it would win"


def scores_of(w, data):
    base, experts = weights_of()
    merged = {
        name: base[name] + sum(w[k, p] * (experts[task][name] - base[name]) for k, task in enumerate(TASKS))
        for p, name in enumerate(vectors_of())
    }
    found = {}
    for task in TASKS:
        rows = data.rows(task, "validation")
        points, labels = torch.tensor(rows["point"][:]), torch.tensor(rows["label"][:])
        found[task] = float((logits_of(merged, task, points).argmax(1) == labels).double().mean())
    return found, merged


def test_a_task_that_has_no_expert_and_an_expert_that_has_no_data():
    """Few-shot: the target's own expert is left out, and the others' data are not looked at."""
    vectors = vectors_of(("one", "two"))
    module = descending(ToyClassifier(), vectors, partial(LayerWise, init=0.0), CrossEntropy(), 0.05)
    data = ToyPoints(("one", "three"), labelled=True, shots=2, only=["three"])
    fit_toy(module, data, 10, callbacks=[KeepBest(HighestScore(), 2)])
    protocol = module.coefficients().protocol
    assert protocol["calibration_samples"] == {"three": 6} and list(protocol["selection"]["scores"]) == ["three"]
    assert module.merged.parametrization.w.abs().min() > 0 or protocol["selection"]["step"] == 0
    with pytest.raises(ConfigError, match="expert 'two' has no data"):
        fit_toy(
            descending(ToyClassifier(), vectors, LayerWise, CrossEntropy(), 0.05),
            ToyPoints(("one", "three"), labelled=True),
        )


def test_a_validation_split_without_labels_cannot_choose():
    class Blind(ToyPoints):
        def load(self, task):
            splits = dict(super().load(task))
            return {**splits, "validation": splits["validation"].remove_columns("label")}

    with pytest.raises(ConfigError, match="task 'one' has none with labels"):
        fit_toy(module_of(), Blind(labelled=True), 2, callbacks=[KeepBest(HighestScore())])


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="every"):
        KeepBest(HighestScore(), every=0)
    with pytest.raises(ConfigError, match="patience"):
        KeepBest(HighestScore(), patience=0)


@pytest.mark.slow
def test_a_run_writes_the_chosen_step_also_when_it_is_resumed(pool, image_folders, tmp_path, monkeypatch, capfd):
    """Through the command line: file and summary say the step; a finished run, resumed, writes the same once more."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    method = write_yaml(
        tmp_path / "m.yaml",
        {
            "model": {
                "parametrization": {"class_path": "adamerge.parametrizations.LayerWise", "init_args": {"init": 0.0}},
                "objective": "adamerge.objectives.CrossEntropy",
                "task_weights": {"colours": -1.0},
                "search": {"lr": 0.2},
            },
            "data": {"labelled": True},
            "trainer": {
                "callbacks": [
                    {
                        "class_path": "adamerge.KeepBest",
                        "init_args": {"selection": {"class_path": "adamerge.LowestTarget"}, "every": 2},
                    }
                ]
            },
        },
    )
    pool_file = write_yaml(tmp_path / "p.yaml", pool_config(pool, image_folders))
    outcome = command(capfd, "fit", *fit_words(pool_file, "--name=n", "--id=a", method=method, steps=6))
    assert outcome.code == 0, outcome.err[-2000:]
    run = tmp_path / "runs/n/a"
    summary, written = read_json(run / "summary.json"), (run / "coefficients.safetensors").read_bytes()
    chosen = summary["protocol"]["selection"]
    assert chosen["rule"] == "LowestTarget" and chosen["looks"] == 4 and chosen["split"] == "validation, labels read"
    assert summary["metrics"]["validation/accuracy/shapes"] == chosen["scores"]["shapes"], "of what was written"
    assert summary["metrics"]["validation/accuracy"] == pytest.approx(sum(chosen["scores"].values()) / 2)
    metadata, values = read_coefficients(run / "coefficients.safetensors")
    assert metadata["step"] == chosen["step"] and metadata["protocol"] == summary["protocol"]
    assert any(value.any() for value in values["w"].values()) is (chosen["step"] > 0)
    (run / "coefficients.safetensors").unlink()
    assert command(capfd, "fit", "--resume", run).code == 0
    assert (run / "coefficients.safetensors").read_bytes() == written
    assert read_json(run / "summary.json")["protocol"] == summary["protocol"]


def held(**arguments) -> ToyPoints:
    return ToyPoints(rows=100, held_out=0.1, **arguments)


def sharp() -> MergingModule:
    """Entropy at a rate at which it does some good first, and then leaves the experts."""
    return descending(ToyClassifier(), vectors_of(), partial(LayerWise, init=0.6), Entropy(), 0.1)


def agreement_of(w, data) -> float:
    """The mean over tasks of the share of held-out points of which model and expert hold the same class, in float64."""
    base, experts = weights_of()
    merged = {
        name: base[name].double()
        + sum(w[k, p].double() * (experts[task][name] - base[name]).double() for k, task in enumerate(TASKS))
        for p, name in enumerate(vectors_of())
    }
    shares = []
    for task in TASKS:
        points = torch.tensor(data.rows(task, "held_out")["point"][:]).double()
        expert = {name: value.double() for name, value in experts[task].items()}
        same = logits_of(merged, task, points).argmax(1) == logits_of(expert, task, points).argmax(1)
        shares.append(same.double().mean())
    return float(torch.stack(shares).mean())


@pytest.fixture(scope="module")
def without_labels():
    """A fit of 40 steps that chooses by agreement, and the coefficients after each step."""
    trail, module, data = Trail(), sharp(), held()
    fit_toy(module, data, 40, callbacks=[trail, KeepBest(HighestAgreement(), every=4)])
    return module, data, trail


def test_the_best_step_by_agreement_is_the_result(without_labels):
    module, data, trail = without_labels
    agreements = {step: agreement_of(trail.w[step], data) for step in range(0, 41, 4)}
    best = max(agreements, key=lambda step: (agreements[step], -step))
    chosen = module.coefficients().protocol["selection"]
    assert chosen["step"] == best == module.coefficients().step and 0 < best < 40
    assert torch.equal(module.merged.parametrization.w, trail.w[best])
    assert chosen["value"] == pytest.approx(agreements[best]) and agreements[best] > agreements[40]
    assert chosen["labelled"] is False and chosen["split"] == "held-out calibration inputs, labels never read"
    assert chosen["scored"] == "held_out/agreement" and chosen["looks"] == 11


@pytest.mark.parametrize("kind", ["wrong", "none"])
def test_labels_have_no_part_in_it(kind, without_labels):
    class Blind(ToyPoints):
        def load(self, task):
            return {split: rows.remove_columns("label") for split, rows in super().load(task).items()}

    data = held(wrong_labels=True) if kind == "wrong" else Blind(rows=100, held_out=0.1)
    module = fit_toy(sharp(), data, 40, callbacks=[KeepBest(HighestAgreement(), every=4)])
    assert torch.equal(module.merged.parametrization.w, without_labels[0].merged.parametrization.w)
    assert module.coefficients().protocol["selection"] == without_labels[0].coefficients().protocol["selection"]


def test_two_fits_in_one_process(without_labels):
    """With the same callback and module: the second one knows nothing of the first."""
    keep, module = KeepBest(HighestAgreement(), every=4), sharp()
    fit_toy(module, held(seed=5), 7, callbacks=[keep])
    module.merged.parametrization.w.data.fill_(0.6)
    fit_toy(module, held(), 40, callbacks=[keep])
    assert torch.equal(module.merged.parametrization.w, without_labels[0].merged.parametrization.w)


@pytest.mark.parametrize("values", [(1, 2, 3, 2, 1, 0, 9, 9, 9), (None, 3, None, 2, 1, 9, 9, 9, 9)])
def test_patience_ends_a_fit(values):
    """Two steps a look: the best is after four, or after two, and the third look without a better one is the last."""
    trail, module = Trail(), module_of()
    fit_toy(module, ToyPoints(labelled=True), 16, callbacks=[trail, KeepBest(Plan(*values), 2, patience=3)])
    best = 2 * values.index(3)
    assert module.result.ended == "3 looks in a row found no better step" and max(trail.w) == best + 6
    assert torch.equal(module.merged.parametrization.w, trail.w[best]) and module.coefficients().step == best


def saved_at(folder, step):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=step, save_top_k=-1)


@pytest.mark.parametrize("stop", [4, 6, 12])
def test_a_resumed_fit_ends_where_the_whole_one_does(tmp_path, stop):
    """Before its end, between two looks, and where it is over already: then no step is done, and the result is the same."""
    settings = {**QUIET, "enable_checkpointing": True, "max_epochs": 1, "default_root_dir": str(tmp_path)}

    def fit(steps, **resume):
        module, trail = sharp(), Trail()
        callbacks = [trail, KeepBest(HighestAgreement(), every=4, patience=2), saved_at(tmp_path / "kept", stop)]
        Trainer(**settings, max_steps=steps, callbacks=callbacks).fit(module, held(), **resume)
        return module, trail

    whole, trail = fit(60)
    last = max(trail.w)
    assert last < 60 and last % 4 == 0 and whole.result.ended
    at = tmp_path / "kept" / f"step={stop * (last // stop)}.ckpt"
    for steps in (60, 80) if stop == 12 else (60,):
        resumed, trail = fit(steps, ckpt_path=at, weights_only=True)
        assert torch.equal(resumed.merged.parametrization.w, whole.merged.parametrization.w)
        assert resumed.coefficients().protocol == whole.coefficients().protocol
        assert max(trail.w, default=last) == last and resumed.held_out.first is not None


def test_the_step_that_was_chosen_is_validated_and_the_last_one_goes_on(tmp_path):
    """The last figures are of the result, whatever it was chosen by; a checkpoint after them is of the last step."""
    seen = {}

    class Saving(Callback):
        def on_validation_end(self, trainer, module):
            seen["after"] = module.merged.parametrization.w.detach().clone()

    trail, module = Trail(), sharp()
    trainer = Trainer(
        **{**QUIET, "limit_val_batches": 1.0},
        max_steps=40,
        max_epochs=1,
        callbacks=[trail, KeepBest(HighestAgreement(), every=4), Saving()],
    )
    data = held()
    trainer.fit(module, data)
    best = module.coefficients().step
    scores, _ = scores_of(trail.w[best], data)
    logged = trainer.logged_metrics
    assert {task: float(logged[f"validation/accuracy/{task}"]) for task in TASKS} == pytest.approx(scores)
    assert torch.equal(seen["after"], trail.w[40]) and torch.equal(module.merged.parametrization.w, trail.w[best])


def test_what_cannot_choose_without_labels_is_refused_before_a_fit():
    with pytest.raises(ConfigError, match=r"none are held out[\s\S]*set data.held_out=0.1"):
        fit_toy(sharp(), ToyPoints(), 2, callbacks=[KeepBest(HighestAgreement())])
    away = descending(ToyClassifier(), vectors_of(), LayerWise, Entropy(), 0.1, task_weights={"two": -1.0})
    with pytest.raises(ConfigError, match="moves away from task 'two'"):
        fit_toy(away, held(), 2, callbacks=[KeepBest(HighestAgreement())])


def test_a_run_records_that_no_label_chose_and_that_it_is_over(pool, image_folders, tmp_path, monkeypatch, capfd):
    """Through the command line: finished before its last step, figures of the chosen step, in the section without labels."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    keep = {"selection": "adamerge.HighestAgreement", "every": 1, "patience": 2}
    method = write_yaml(
        tmp_path / "m.yaml",
        {
            "model": {"parametrization": "adamerge.LayerWise", "objective": "adamerge.Entropy", "search": {"lr": 1e-6}},
            "data": {"held_out": 0.1},
            "trainer": {"callbacks": [{"class_path": "adamerge.KeepBest", "init_args": keep}]},
        },
    )
    pool_file = write_yaml(tmp_path / "p.yaml", pool_config(pool, image_folders))
    outcome = command(capfd, "fit", *fit_words(pool_file, "--name=n", "--id=a", method=method, steps=6))
    assert outcome.code == 0, outcome.err[-2000:]
    run = tmp_path / "runs/n/a"
    summary, written = read_json(run / "summary.json"), (run / "coefficients.safetensors").read_bytes()
    assert (summary["status"], summary["step"], summary["ended"]) == (
        "finished",
        2,
        "2 looks in a row found no better step",
    )
    assert "over after 2 of 6 steps: 2 looks" in outcome.out and "--resume" not in outcome.out
    protocol = summary["protocol"]
    assert protocol["selection"]["labelled"] is False and protocol["selection"]["step"] == 0
    assert set(protocol["held_out_samples"].values()) == {3} == set(protocol["calibration_samples"].values())
    assert summary["metrics"]["held_out/agreement"] == pytest.approx(protocol["selection"]["value"])
    assert section_of(run) == "unlabelled"
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert all(
        f"held_out/{name}" in header for name in ("agreement", "marginal_entropy/shapes", "top_class_share/shapes")
    )
    assert command(capfd, "fit", "--resume", run).code == 0
    assert (run / "coefficients.safetensors").read_bytes() == written and read_json(run / "summary.json")["step"] == 2
