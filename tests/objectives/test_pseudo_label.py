"""Pseudo-labels: the trusted set, the mixing, the sharpening and the threshold by hand; and that no label is in them."""

import math

import pytest
import torch
from toy_points import TASKS, ToyClassifier, ToyPoints, fit_toy, vectors_of

from adamerge.backbones import Batch, Encoded, Output
from adamerge.errors import ConfigError, DataError
from adamerge.modules import AdaptiveMerging
from adamerge.objectives import Course, Entropy, PseudoLabel, Sum
from adamerge.objectives.views import View
from adamerge.parametrizations import LayerWise

# logits of nine samples and three classes, log of (confidence of the first-named class, rest shared)
SURE = {
    0: (0, 0.95),
    1: (0, 0.5),
    2: (1, 0.6),
    3: (0, 0.8),
    4: (0, 0.9),
    5: (1, 0.99),
    6: (0, 0.7),
    7: (0, 0.6),
    8: (1, 0.5),
}


def logits_for(sure: dict[int, tuple[int, float]]) -> torch.Tensor:
    table = torch.stack([torch.full((3,), (1 - p) / 2) for _, p in sure.values()])
    for row, (label, p) in enumerate(sure.values()):
        table[row, label] = p
    return table.log()


class Table:
    """Samples whose input is their number, and a model that looks its logits up."""

    def __init__(self, sure: dict[int, tuple[int, float]] = SURE) -> None:
        self.logits, self.looks = logits_for(sure), []

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])

    def predict(self, inputs: torch.Tensor) -> Output:
        self.looks.append(inputs[:, 0].tolist())
        logits = self.logits[inputs[:, 0].long()]
        return Output(logits, Encoded(torch.zeros(len(inputs), 1)))


def begun(table: Table, steps: int = 20, batch_size: int = 4, **arguments) -> PseudoLabel:
    objective = PseudoLabel(**arguments)
    objective.begin(Course({"one": table}, {"one": 3}, steps, batch_size))
    return objective


def batch_of(indices: list[int], step: int = 0) -> Batch:
    return Batch(torch.tensor(indices).float()[:, None], indices=torch.tensor(indices), step=step)


def test_the_trusted_are_the_surest_of_each_class_n_over_c_of_them():
    """N / C = 3. Surest first, class 0 is predicted for 0, 4, 3, 6, 7, 1; class 1 for 5, 2, 8; class 2 never."""
    table = Table()
    objective = begun(table)
    assert objective.trusted("one").tolist() == [-1] * 9
    objective.prepare("one", batch_of([0, 1, 2, 3]), table.predict)
    assert objective.trusted("one").tolist() == [0, -1, 1, 0, 0, 1, -1, -1, 1]
    assert table.looks[0] == list(range(9)), "at all samples, as they are"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"limit": 1}, [0, -1, -1, -1, -1, 1, -1, -1, -1]),
        ({"share": 2 / 3}, [0, -1, 1, -1, 0, 1, -1, -1, -1]),
        ({"share": 0.1}, [0, -1, -1, -1, -1, 1, -1, -1, -1]),  # one at least
    ],
)
def test_fewer_are_trusted_when_asked(arguments, expected):
    table = Table()
    objective = begun(table, **arguments)
    objective.prepare("one", batch_of([0, 1, 2, 3]), table.predict)
    assert objective.trusted("one").tolist() == expected


def test_the_trusted_set_follows_the_model_at_each_new_pass_and_only_then():
    """Nine samples, four a step: the second pass begins within step 2, whose first sample is the ninth of the first pass."""
    table = Table()
    objective = begun(table)
    objective.prepare("one", batch_of([0, 1, 2, 3]), table.predict)
    before = objective.trusted("one").clone()
    table.logits = logits_for({**SURE, 0: (2, 0.9)})  # the model changes its mind about sample 0
    for step in (1, 2):
        objective.prepare("one", batch_of([4, 5, 6, 7], step), table.predict)
        assert torch.equal(objective.trusted("one"), before)
    objective.prepare("one", batch_of([4, 5, 6, 7], 3), table.predict)
    assert objective.trusted("one").tolist() == [2, -1, 1, 0, 0, 1, 0, -1, 1]


def test_a_quarter_of_the_batch_is_trusted_and_the_rest_is_not():
    """Trusted: 0, 2, 3, 4, 5, 8; the others: 1, 6, 7."""
    trusted, others = {0, 2, 3, 4, 5, 8}, {1, 6, 7}
    for indices, kept in (([0, 2, 3, 4], 1), ([1, 6, 7, 1], 3), ([0, 1, 2, 6], 3), ([5, 1, 6, 7], 4)):
        table = Table()
        prepared = begun(table).prepare("one", batch_of(indices, 1), table.predict)
        found = prepared.indices.tolist()
        assert len(found) == 4 and sum(index in trusted for index in found) == 1, indices
        assert all(index in others for index in found if index not in trusted)
        assert torch.equal(prepared.inputs[:, 0], prepared.indices.float()), "inputs go with their numbers"
        assert sum(a == b for a, b in zip(found, indices, strict=True)) == kept, "the others stay in their places"


def test_targets_are_classes_of_the_trusted_and_sharpened_predictions_of_the_others():
    """p = (0.7, 0.15, 0.15) squared and normalised: 0.49 / 0.535 = 0.915888; p = (0.5, 0.25, 0.25): 0.25 / 0.375 = 2 / 3."""
    table = Table()
    prepared = begun(table).prepare("one", batch_of([5, 6, 1, 7]), table.predict)
    assert prepared.indices.tolist() == [5, 6, 1, 7]
    small = 0.36 / 0.44  # of (0.6, 0.2, 0.2)
    expected = [[0, 1, 0], [0.915888, 0.042056, 0.042056], [2 / 3, 1 / 6, 1 / 6], [small, 0.0909091, 0.0909091]]
    assert torch.allclose(prepared.targets, torch.tensor(expected), atol=1e-6)
    assert prepared.labels is None


def test_sharpening_sharpens():
    for temperature, top in ((1.0, 0.7), (0.5, 0.915888), (0.25, 0.915888**2 / (0.915888**2 + 2 * 0.042056**2))):
        table = Table()
        prepared = begun(table, temperature=temperature).prepare("one", batch_of([5, 6, 1, 7]), table.predict)
        assert float(prepared.targets[1].max()) == pytest.approx(top, abs=1e-5)


def test_the_threshold_rises_from_nine_tenths_towards_one():
    objective = begun(Table(), steps=20)
    assert [objective.omega(step) for step in (0, 5, 10, 19)] == pytest.approx([0.9, 0.925, 0.95, 0.995])
    assert begun(Table(), steps=4, threshold=0.5).omega(1) == pytest.approx(0.625)


def test_a_sample_counts_while_its_sharpened_prediction_is_above_the_threshold():
    """max q = 0.915888 counts until omega passes it, at step 20 * 0.15888 = 3.2; a trusted one always does."""
    objective = begun(Table())
    targets = torch.tensor([[0.0, 1.0, 0.0], [0.915888, 0.042056, 0.042056], [2 / 3, 1 / 6, 1 / 6]])
    for step, expected in ((0, [1, 1, 0]), (3, [1, 1, 0]), (4, [1, 0, 0]), (19, [1, 0, 0])):
        assert objective.weight(Batch(torch.zeros(3, 1), step=step, targets=targets)).tolist() == expected


def test_the_loss_is_the_cross_entropy_of_the_strong_view():
    """q = (3/4, 1/4, 0), p = (1/2, 1/4, 1/4): 3/4 log 2 + 1/4 log 4 = 5/4 log 2."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    batch = Batch(torch.zeros(1, 1), targets=torch.tensor([[0.75, 0.25, 0.0]]))
    assert float(PseudoLabel()(Output(logits, Encoded(logits)), batch)) == pytest.approx(1.25 * math.log(2), rel=1e-6)


class Add(View):
    """Shifts numbers, so that views can be told apart."""

    def __init__(self, amount: float) -> None:
        self.amount, self.seeds = amount, []

    def __call__(self, inputs, seeds):
        self.seeds.append(seeds.tolist())
        return inputs + self.amount


def test_the_weak_view_is_looked_at_and_the_strong_one_learned_from():
    table, weak, strong = Table({**SURE, 9: (2, 0.5)}), Add(1.0), Add(100.0)
    objective = begun(table, weak=weak, strong=strong)
    prepared = objective.prepare("one", batch_of([5, 6, 1, 7]), table.predict)
    assert table.looks[-1] == (prepared.indices + 1).tolist()
    assert prepared.inputs[:, 0].tolist() == (prepared.indices + 100).tolist()
    assert not set(weak.seeds[0]) & set(strong.seeds[0]) and len(set(weak.seeds[0])) == 4
    objective.prepare("one", batch_of([5, 6, 1, 7], 1), table.predict)
    assert not set(weak.seeds[0]) & set(weak.seeds[1]), "another look at the next step"


def test_without_confident_samples_nothing_is_learned():
    objective = begun(Table())
    assert objective.weight(Batch(torch.zeros(2, 1), targets=torch.full((2, 3), 1 / 3))).tolist() == [0, 0]


def module_of(objective, **arguments) -> AdaptiveMerging:
    return AdaptiveMerging(ToyClassifier(), vectors_of(), LayerWise, objective, 0.05, **arguments)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_fit_learns_and_no_label_reaches_it(micro_batch):
    found = []
    for wrong in (False, True):
        module = fit_toy(module_of(PseudoLabel(), micro_batch=micro_batch), ToyPoints(wrong_labels=wrong), 12)
        found.append(module.merged.parametrization.w.detach().clone())
        assert (module.objective.trusted("two") >= 0).any()
    assert torch.equal(*found) and (found[0] - 0.3).abs().max() > 0.05


def test_the_loss_of_a_step_is_the_mean_over_the_samples_that_count():
    """With the views the same, from the model's own logits in float64."""
    from toy_points import logits_of, weights_of

    from adamerge.data.steps import Steps

    module, data = module_of(PseudoLabel(seed=3)), ToyPoints()
    fit_toy(module, data, 1)
    base, experts = weights_of()
    samples = {task: data.samples(task, "calibration") for task in TASKS}
    merged = {
        name: value.double() + 0.3 * sum(expert[name].double() - value.double() for expert in experts.values())
        for name, value in base.items()
    }
    for task, batch in Steps(samples, None, 8, 0, 1)[0].items():
        every = torch.stack([samples[task][i] for i in range(40)]).double()
        p = logits_of(merged, task, every).softmax(-1)
        confidence, label = p.max(-1)
        trusted = torch.full((40,), -1)
        for c in range(3):
            of_class = [i for i in confidence.argsort(descending=True).tolist() if label[i] == c]
            trusted[of_class[: 40 // 3]] = c
        assert module.objective.trusted(task).tolist() == trusted.tolist()
        chosen = PseudoLabel(seed=3)
        chosen.begin(Course(samples, dict.fromkeys(TASKS, 3), 1, 8))
        chosen.trusted(task).copy_(trusted)
        indices = chosen._mix(task, batch).indices
        losses = []
        for i in indices.tolist():
            q = p[i] ** 2 / (p[i] ** 2).sum() if trusted[i] < 0 else torch.eye(3, dtype=torch.float64)[trusted[i]]
            if q.max() > 0.9:
                losses.append(-(q * p[i].log()).sum())
        logged = float(module.trainer.logged_metrics[f"train/loss/{task}"])
        assert logged == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_a_resumed_fit_is_the_same_to_the_bit_in_the_middle_of_a_pass(tmp_path):
    """40 samples, 8 a step: step 13 is within the third pass."""
    data = ToyPoints
    whole = fit_toy(
        module_of(PseudoLabel()), data(), 16, enable_checkpointing=True, default_root_dir=str(tmp_path / "a")
    )
    from lightning import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from toy_points import QUIET

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=13, save_top_k=-1)
    settings = {
        **QUIET,
        "enable_checkpointing": True,
        "max_steps": 16,
        "max_epochs": 1,
        "default_root_dir": str(tmp_path),
    }
    first = module_of(PseudoLabel())
    Trainer(**settings, callbacks=[keep]).fit(first, data())
    saved = torch.load(tmp_path / "step=13.ckpt", weights_only=True)["state_dict"]
    assert saved["objective._extra_state"] == {"one": 2, "two": 2} and (saved["objective.trusted_0"] >= 0).any()
    resumed = module_of(PseudoLabel())
    Trainer(**settings).fit(resumed, data(), ckpt_path=tmp_path / "step=13.ckpt", weights_only=True)
    assert torch.equal(resumed.merged.parametrization.w, whole.merged.parametrization.w)
    for task in TASKS:
        assert torch.equal(resumed.objective.trusted(task), whole.objective.trusted(task))


def test_in_a_sum_it_keeps_its_targets_and_gets_ready():
    module = fit_toy(module_of(Sum([Entropy(), PseudoLabel()])), ToyPoints(), 3)
    assert torch.isfinite(module.merged.parametrization.w).all()
    with pytest.raises(ConfigError, match="chooses other samples"):
        from adamerge.objectives import CrossEntropy

        fit_toy(module_of(Sum([CrossEntropy(), PseudoLabel()])), ToyPoints(labelled=True), 3)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"threshold": 1.0}, "threshold"),
        ({"part": 1.5}, "part"),
        ({"share": 0.0}, "share"),
        ({"limit": 0}, "limit"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, what):
    with pytest.raises(ConfigError, match=what):
        PseudoLabel(**arguments)


def test_predictions_at_every_position_are_refused():
    logits = torch.zeros(2, 5, 3)
    with pytest.raises(ConfigError, match="one prediction per sample"):
        PseudoLabel()(Output(logits, Encoded(logits)), Batch(torch.zeros(2, 1), targets=torch.zeros(2, 3)))


def test_a_batch_that_was_not_prepared_is_refused():
    batch = Batch(torch.zeros(2, 1))
    with pytest.raises(DataError, match="no targets"):
        PseudoLabel()(Output(torch.zeros(2, 3), Encoded(torch.zeros(2, 1))), batch)
    with pytest.raises(DataError, match="no targets"):
        PseudoLabel().weight(batch)
    with pytest.raises(ConfigError, match="begin"):
        PseudoLabel().prepare("one", batch_of([1]), Table().predict)
