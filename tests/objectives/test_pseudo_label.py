"""Pseudo-labels: trusted set, mixing, softening and threshold by hand, a step in float64 from the paper; and no labels."""

import math

import pytest
import torch
from modules import descending
from rounding import Disturb, allowed, undisturbed
from toy_points import ROUNDINGS, TASKS, ToyClassifier, ToyPoints, fit_toy, logits_of, vectors_of, weights_of

from adamerge.backbones import Batch, Encoded, Output
from adamerge.errors import ConfigError, DataError
from adamerge.objectives import Course, CropAndFlip, Entropy, PseudoLabel, Sum, SurestOfPredicted, Unchanged, View
from adamerge.objectives.views import uniform
from adamerge.parametrizations import LayerWise
from adamerge.training import MergingModule

# predictions for nine samples of three classes; the square roots of 3, 6 and 7 are fractions
SURE = [
    (0.95, 0.03, 0.02),
    (0.50, 0.20, 0.30),
    (0.25, 0.60, 0.15),
    (4 / 9, 4 / 9, 1 / 9),
    (0.90, 0.06, 0.04),
    (0.005, 0.99, 0.005),
    (36 / 49, 9 / 49, 4 / 49),
    (64 / 81, 16 / 81, 1 / 81),
    (0.26, 0.50, 0.24),
]


class Table:
    """Samples whose input is their number, and a model that looks its logits up."""

    def __init__(self, sure: list[tuple[float, ...]] = SURE) -> None:
        self.logits, self.looks = torch.tensor(sure).log(), []

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])

    def predict(self, inputs: torch.Tensor) -> Output:
        self.looks.append(inputs[:, 0].tolist())
        logits = self.logits[inputs[:, 0].long()]
        return Output(logits, Encoded(torch.zeros(len(inputs), 1)))


def begun(table: Table, steps: int = 20, batch_size: int = 4, **arguments) -> PseudoLabel:
    objective = PseudoLabel(**{"strong": Unchanged(), **arguments})
    objective.begin(Course({"one": table}, {"one": 3}, steps, batch_size))
    return objective


def batch_of(indices: list[int], step: int = 0) -> Batch:
    return Batch(torch.tensor(indices).float()[:, None], indices=torch.tensor(indices), step=step)


def test_the_trusted_are_the_surest_of_each_class_n_over_c_of_them():
    """N / C = 3. By p_0: 0, 4, 7; by p_1: 5, 2, 8; by p_2: 1, 8, 2, of which 8 and 2 are surer of class 1."""
    table = Table()
    objective = begun(table)
    assert objective.trusted("one").tolist() == [-1] * 9
    objective.prepare("one", batch_of([0, 1, 2, 3]), table.predict)
    assert objective.trusted("one").tolist() == [0, 2, 1, -1, 0, 1, -1, 0, 1]
    assert table.looks[0] == list(range(9)), "at all samples, as they are"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"limit": 1}, [0, 2, -1, -1, -1, 1, -1, -1, -1]),
        ({"share": 2 / 3}, [0, 2, 1, -1, 0, 1, -1, -1, 2]),
        ({"share": 0.1}, [0, 2, -1, -1, -1, 1, -1, -1, -1]),  # one at least
        ({"trust": SurestOfPredicted()}, [0, -1, 1, -1, 0, 1, -1, 0, 1]),
    ],
)
def test_others_are_trusted_when_asked(arguments, expected):
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
    table.logits[0] = torch.tensor([0.05, 0.05, 0.9]).log()  # the model changes its mind about sample 0
    for step in (1, 2):
        objective.prepare("one", batch_of([4, 5, 6, 7], step), table.predict)
        assert torch.equal(objective.trusted("one"), before)
    objective.prepare("one", batch_of([4, 5, 6, 7], 3), table.predict)
    assert objective.trusted("one").tolist() == [2, 2, 1, -1, 0, 1, 0, 0, 1]


def test_a_quarter_of_the_batch_is_trusted_and_the_rest_is_not():
    """Trusted: 0, 1, 2, 4, 5, 8; the others: 3, 6, 7."""
    trusted, others = {0, 1, 2, 4, 5, 8}, {3, 6, 7}
    for indices, kept in (([0, 2, 1, 4], 1), ([3, 6, 7, 3], 3), ([0, 3, 2, 6], 3), ([5, 3, 6, 7], 4)):
        table = Table()
        prepared = begun(table, share=2 / 3).prepare("one", batch_of(indices, 1), table.predict)
        found = prepared.indices.tolist()
        assert len(found) == 4 and sum(index in trusted for index in found) == 1, indices
        assert all(index in others for index in found if index not in trusted)
        assert torch.equal(prepared.inputs[:, 0], prepared.indices.float()), "inputs go with their numbers"
        assert sum(a == b for a, b in zip(found, indices, strict=True)) == kept, "the others stay in their places"


def test_targets_are_classes_of_the_trusted_and_softened_predictions_of_the_others():
    """Of y = (36, 9, 4) / 49 the roots are (6, 3, 2) / 7, which sum to 11 / 7."""
    table = Table()
    prepared = begun(table, share=2 / 3).prepare("one", batch_of([5, 6, 3, 7]), table.predict)
    assert prepared.indices.tolist() == [5, 6, 3, 7]
    expected = [[0, 1, 0], [6 / 11, 3 / 11, 2 / 11], [2 / 5, 2 / 5, 1 / 5], [8 / 13, 4 / 13, 1 / 13]]
    assert torch.allclose(prepared.targets, torch.tensor(expected), atol=1e-6)
    assert prepared.labels is None


@pytest.mark.parametrize(("temperature", "power"), [(1.0, 1.0), (0.5, 2.0), (0.25, 4.0)])
def test_a_temperature_below_one_sharpens(temperature, power):
    table = Table()
    objective = begun(table, share=2 / 3, temperature=temperature)
    prepared = objective.prepare("one", batch_of([5, 6, 3, 7]), table.predict)
    powers = [value**power for value in SURE[6]]
    assert prepared.targets[1].tolist() == pytest.approx([value / sum(powers) for value in powers], abs=1e-6)


def test_the_threshold_rises_from_nine_tenths_towards_one():
    objective = begun(Table(), steps=20)
    assert [objective.omega(step) for step in (0, 5, 10, 19)] == pytest.approx([0.9, 0.925, 0.95, 0.995])
    assert begun(Table(), steps=4, threshold=0.5).omega(1) == pytest.approx(0.625)


def test_a_sample_counts_while_its_softened_prediction_is_above_the_threshold():
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
    table, weak, strong = Table([*SURE, (0.3, 0.3, 0.4)]), Add(1.0), Add(100.0)
    objective = begun(table, weak=weak, strong=strong, share=2 / 3)
    prepared = objective.prepare("one", batch_of([5, 6, 3, 7]), table.predict)
    assert table.looks[-1] == (prepared.indices + 1).tolist()
    assert prepared.inputs[:, 0].tolist() == (prepared.indices + 100).tolist()
    assert not set(weak.seeds[0]) & set(strong.seeds[0]) and len(set(weak.seeds[0])) == 4
    objective.prepare("one", batch_of([5, 6, 3, 7], 1), table.predict)
    assert not set(weak.seeds[0]) & set(weak.seeds[1]), "another look at the next step"


def test_by_default_images_are_looked_at_as_they_are_and_learned_from_in_parts():
    objective = PseudoLabel()
    assert isinstance(objective.weak, Unchanged) and isinstance(objective.strong, CropAndFlip)
    assert (objective.strong.smallest, objective.strong.flip) == (0.5, 0.5)


def test_without_confident_samples_nothing_is_learned():
    objective = begun(Table())
    assert objective.weight(Batch(torch.zeros(2, 1), targets=torch.full((2, 3), 1 / 3))).tolist() == [0, 0]


def module_of(objective, lr: float = 0.05, **arguments) -> MergingModule:
    return descending(ToyClassifier(), vectors_of(), LayerWise, objective, lr, **arguments)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_fit_learns_and_no_label_reaches_it(micro_batch):
    found = []
    for wrong in (False, True):
        module = module_of(PseudoLabel(strong=Unchanged()), micro_batch=micro_batch)
        fit_toy(module, ToyPoints(wrong_labels=wrong), 12)
        found.append(module.merged.parametrization.w.detach().clone())
        assert (module.objective.trusted("two") >= 0).any()
    assert torch.equal(*found) and (found[0] - 0.3).abs().max() > 0.05


class Times(View):
    """Points further out."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, inputs, seeds):
        return inputs * self.factor


class Seen(PseudoLabel):
    """Remembers which samples it put into each task's batch."""

    def prepare(self, task, batch, predict):
        prepared = super().prepare(task, batch, predict)
        self.chosen = {**getattr(self, "chosen", {}), task: prepared.indices.tolist()}
        return prepared


WEAK, STRONG = 0.9, 1.3


def papers_trusted(p: torch.Tensor, most: int) -> dict[int, int]:
    """For each class the samples of largest p_c among all; of two classes, the one that the sample is surer of."""
    trusted: dict[int, int] = {}
    for c in range(p.shape[1]):
        for i in sorted(range(len(p)), key=lambda i: -float(p[i, c]))[:most]:
            if i not in trusted or p[i, c] > p[i, trusted[i]]:
                trusted[i] = c
    return trusted


def papers_loss(
    w: torch.Tensor, task: str, points: torch.Tensor, chosen: list[int], most: int, omega: float, disturb: Disturb
):
    """Appendix E in float64: the mean of -sum_c q_c log p_c(strong) over the samples with max q > omega; and which count."""
    base, experts = weights_of()
    merged = {
        name: disturb(base[name].double())
        + sum(w[k, j] * disturb(experts[t][name].double() - base[name].double()) for k, t in enumerate(TASKS))
        for j, name in enumerate(vectors_of())
    }
    trusted = papers_trusted(logits_of(merged, task, points).detach().softmax(-1), most)
    losses = {}
    for i in chosen:
        if i in trusted:
            q = torch.eye(3, dtype=torch.float64)[trusted[i]]
        else:
            y = logits_of(merged, task, WEAK * points[i : i + 1]).detach().softmax(-1)[0]
            q = y**0.5 / (y**0.5).sum()
        assert abs(float(q.max()) - omega) > 1e-4, "rounding decides which samples count"
        if q.max() > omega:
            log_p = logits_of(merged, task, STRONG * points[i : i + 1]).log_softmax(-1)[0]
            losses[i] = -(q * log_p).sum()
    count = sum(i in losses for i in chosen)
    return sum(losses[i] for i in chosen if i in losses) / count, trusted, set(losses)


def test_loss_and_gradient_of_a_step_are_the_papers():
    """From weights, points and formulas alone; which samples fill the batch is the objective's to draw."""
    objective = Seen(Times(WEAK), Times(STRONG), share=0.5, threshold=0.6, seed=3)
    module, data, gradients = module_of(objective), ToyPoints(), []
    w = module.merged.parametrization.w.detach().double().requires_grad_(True)
    module.merged.parametrization.w.register_hook(lambda gradient: gradients.append(gradient.clone()))
    fit_toy(module, data, 1)
    points = {task: torch.stack([data.samples(task, "calibration")[i] for i in range(40)]).double() for task in TASKS}

    def paper(task: str, disturb: Disturb = undisturbed):
        return papers_loss(w, task, points[task], objective.chosen[task], 40 // 3 // 2, 0.6, disturb)

    softened = 0
    for task in TASKS:
        _, trusted, counted = paper(task)
        assert {i: c for i, c in enumerate(objective.trusted(task).tolist()) if c >= 0} == trusted
        assert sum(i in trusted for i in objective.chosen[task]) == 2, "a quarter of eight"
        softened += len(counted - set(trusted))
        loss, slack = allowed(lambda disturb, task=task: paper(task, disturb)[0].detach(), ROUNDINGS)
        assert abs(float(module.trainer.logged_metrics[f"train/loss/{task}"]) - float(loss)) <= slack < 1e-4
    assert 0 < softened < 12, "of the untrusted samples some count and some do not"
    right, slack = allowed(
        lambda disturb: torch.autograd.grad(sum(paper(task, disturb)[0] for task in TASKS), w)[0], ROUNDINGS
    )
    assert (gradients[-1].double() - right).abs().max() <= slack < 1e-3 * float(right.abs().max())


class Noise(View):
    """Points moved at random, each by its own seed."""

    def __call__(self, inputs, seeds):
        moves = torch.stack([uniform(seeds, number) for number in range(inputs.shape[1])], dim=1) - 0.5
        return inputs + moves.to(inputs.device)


def test_a_resumed_fit_is_the_same_to_the_bit_in_the_middle_of_a_pass(tmp_path):
    """40 samples, 8 a step: step 13 is within the third pass, and the model no longer thinks what it thought at its start."""
    from lightning import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from toy_points import QUIET

    def noisy() -> MergingModule:
        return module_of(PseudoLabel(strong=Noise(), threshold=0.5), lr=0.3)

    settings = {**QUIET, "enable_checkpointing": True, "max_steps": 16, "max_epochs": 1}
    settings["default_root_dir"] = str(tmp_path)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=13, save_top_k=-1)
    whole, resumed = noisy(), noisy()
    Trainer(**settings, callbacks=[keep]).fit(whole, ToyPoints())
    saved = torch.load(tmp_path / "step=13.ckpt", weights_only=True)["state_dict"]
    assert saved["objective._extra_state"] == {"one": 2, "two": 2} and (saved["objective.trusted_0"] >= 0).any()
    Trainer(**settings).fit(resumed, ToyPoints(), ckpt_path=tmp_path / "step=13.ckpt", weights_only=True)
    assert torch.equal(resumed.merged.parametrization.w, whole.merged.parametrization.w)
    # a fit that forgets which pass it is in looks again, and one that forgets whom it trusted trusts nobody
    for forgotten in (
        {"objective._extra_state": {}},
        {f"objective.trusted_{n}": torch.full((40,), -1) for n in (0, 1)},
    ):
        checkpoint = torch.load(tmp_path / "step=13.ckpt", weights_only=True)
        checkpoint["state_dict"] |= forgotten
        torch.save(checkpoint, tmp_path / "forgotten.ckpt")
        other = noisy()
        Trainer(**settings).fit(other, ToyPoints(), ckpt_path=tmp_path / "forgotten.ckpt", weights_only=True)
        assert not torch.equal(other.merged.parametrization.w, whole.merged.parametrization.w), list(forgotten)


def test_in_a_sum_it_keeps_its_targets_and_gets_ready():
    module = fit_toy(module_of(Sum([Entropy(), PseudoLabel(strong=Unchanged())])), ToyPoints(), 3)
    assert torch.isfinite(module.merged.parametrization.w).all()
    with pytest.raises(ConfigError, match="chooses other samples"):
        from adamerge.objectives import CrossEntropy

        fit_toy(module_of(Sum([CrossEntropy(), PseudoLabel(strong=Unchanged())])), ToyPoints(labelled=True), 3)


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
