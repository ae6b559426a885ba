"""Recomputed running statistics: the numbers of a float64 derivation, kept by file, evaluation and export alike."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from conftest import noise_images
from lightning import Callback, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from modules import bilevel, descending
from pico import pico_pool
from running import ROOT, TASK_ARITHMETIC, child, command, environment, fit_words, without_pictures, write_yaml
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from toy_points import INPUTS, QUIET, WIDTH, ToyClassifier, ToyPoints, fit_toy, vectors_of, weights_of

from adamerge import ImageCalibration, ImageTask, LayerWise, TaskVectors
from adamerge.artifacts.coefficients import load_coefficients, save_coefficients
from adamerge.artifacts.export import export
from adamerge.artifacts.model_card import COEFFICIENTS_FILE
from adamerge.backbones import Encoded
from adamerge.errors import ConfigError, DivergedError
from adamerge.io.coefficient_file import read_coefficients
from adamerge.objectives import Entropy
from adamerge.parametrizations import Concrete
from adamerge.training.batchnorm import MOST_BATCHES, Moments, normalisations, recalibrate
from adamerge.training.callbacks import CoefficientFile
from adamerge.training.evaluation import means
from adamerge.training.keep_best import KeepBest
from adamerge.training.scorer import Scorer
from adamerge.training.selection import Selection

FIRST = "resnet.embedder.embedder.normalization"
STATISTICS = ("running_mean", "running_var")


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.BatchNorm1d(WIDTH)
        self.without = nn.BatchNorm1d(WIDTH, track_running_stats=False)


class NormalisedToy(ToyClassifier):
    """The toy's points through two normalisations; a third is never run, a fourth keeps nothing."""

    def __init__(self, dtype="float32"):
        super().__init__(dtype)
        self.network = Normalised().to(getattr(torch, dtype))

    def tensors(self):
        return self.network.state_dict(keep_vars=True)

    def encode(self, inputs, hidden=()):
        net = self.network
        states = torch.tanh(net.norm(net.first(inputs.to(net.first.weight.dtype))))
        return Encoded(net.dropout(net.last(net.second(states))).float())


def normalised_vectors(tasks=("one", "two")):
    base, experts = weights_of(tasks)
    network = Normalised()
    own = {name: value for name, value in network.state_dict().items() if name.split(".")[0] not in ("first", "second")}
    own |= {name: value + 0.5 for name, value in own.items() if value.is_floating_point()}
    base, experts = base | own, {task: weights | own for task, weights in experts.items()}
    return TaskVectors(base, experts, include=["first.*", "second.*"])


def sgd(parameters):
    return SGD(parameters, 1.0)


def toy(init=0.3, lr=0.5, **arguments):
    return descending(
        NormalisedToy(), normalised_vectors(), partial(LayerWise, init=init), Entropy(), lr, sgd, **arguments
    )


def moments(values):
    """Pooled over ``(samples, channels, ...)``, in float64; unbiased, as batch normalisation keeps it."""
    return values.double().mean([0, *range(2, values.ndim)]), values.double().var([0, *range(2, values.ndim)])


def close(found, expected, tolerance=1e-5):
    return (found.double() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def points(data, task):
    samples = data.samples(task, "calibration")
    return torch.stack([samples[index] for index in range(len(samples))])


def first_layer(module, inputs):
    """What enters the first normalisation, from the formula."""
    vectors, w = module.merged.task_vectors, module.merged.parametrization.coefficients()
    found = {}
    for name in ("first.weight", "first.bias"):
        rows = w[name][:, 0].detach().double()
        deltas = [expert[name].double() - vectors.base[name].double() for expert in vectors.checkpoints.values()]
        found[name] = vectors.base[name].double() + sum(c * delta for c, delta in zip(rows, deltas, strict=True))
    return inputs.double() @ found["first.weight"].T + found["first.bias"]


def test_moments_are_pooled_exactly_and_each_batch_sees_its_own():
    """Two batches of other sizes, far from zero: no average of variances, and no cancellation."""
    layer = nn.BatchNorm2d(3).eval()
    given = [100 + torch.randn(size, 3, 2, 2, generator=torch.Generator().manual_seed(size)) for size in (2, 5)]
    given[1] += 4
    found = Moments(SingleDeviceStrategy("cpu"))
    layer.register_forward_pre_hook(found)
    for values in given:
        train = nn.BatchNorm2d(3)
        assert torch.allclose(layer(values), train(values), atol=1e-4)
    mean, variance = moments(torch.cat(given))
    pooled = found.pooled()
    assert close(pooled[0], mean, 1e-6) and close(pooled[1], variance)
    assert layer.num_batches_tracked == 0 and Moments(SingleDeviceStrategy("cpu")).pooled() is None


@pytest.mark.parametrize("eval_batch_size", [256, 20])
def test_the_first_layer_in_float64(eval_batch_size):
    module, data = toy(recalibrate_buffers=True), ToyPoints(eval_batch_size=eval_batch_size)
    fit_toy(module, data)
    buffers = module.coefficients().buffers
    assert buffers.keys() == {f"{layer}.{which}" for layer in ("norm", "last") for which in STATISTICS}
    entered = first_layer(module, torch.cat([points(data, task) for task in data.fitted]))
    for which, expected in zip(STATISTICS, moments(entered), strict=True):
        assert buffers[f"norm.{which}"].dtype == torch.float32 and close(buffers[f"norm.{which}"], expected)
        assert not torch.equal(buffers[f"norm.{which}"], module.merged.task_vectors.base[f"norm.{which}"])


def test_one_batch_is_torchs_own_training_mode_in_every_layer():
    module, data = toy(recalibrate_buffers=True), ToyPoints()
    fit_toy(module, data)
    other = toy(init=0.0)
    other.merged.parametrization.load_state_dict(module.merged.parametrization.state_dict())
    other.merged.merge()
    network = other.merged.backbone.network
    for layer in (network.norm, network.last):
        layer.train().momentum = None
        layer.reset_running_stats()
    other.merged(torch.cat([points(data, task) for task in data.fitted]))
    for name, value in module.coefficients().buffers.items():
        assert close(value, network.state_dict()[name].double()), name


def test_each_task_weighs_the_same():
    """A task of half the size is seen twice: the mean is the mean of the tasks' means."""

    class Uneven(ToyPoints):
        def load(self, task):
            found = dict(super().load(task))
            rows = found["calibration"]
            return found | {"calibration": rows.select(range(20)) if task == "one" else rows}

    module, data = toy(recalibrate_buffers=True), Uneven()
    fit_toy(module, data)
    one, two = (points(data, task) for task in data.fitted)
    assert (len(one), len(two)) == (20, 40)
    for which, expected in zip(STATISTICS, moments(first_layer(module, torch.cat([one, one, two]))), strict=True):
        assert close(module.coefficients().buffers[f"norm.{which}"], expected)


def test_so_many_batches_and_no_more():
    class Counting(NormalisedToy):
        seen = 0

        def encode(self, inputs, hidden=()):
            self.seen += 1
            return super().encode(inputs, hidden)

    vectors = normalised_vectors()
    module = descending(Counting(), vectors, LayerWise, Entropy(), recalibrate_buffers=True, hold=False)
    data = ToyPoints(rows=MOST_BATCHES + 5, eval_batch_size=2)
    fit_toy(module, data, steps=1)
    assert module.merged.backbone.seen == 1 + MOST_BATCHES
    assert f"{MOST_BATCHES} batches of 1 calibration" in module.coefficients().protocol["recalibrated_buffers"]


def test_the_fit_itself_is_as_without_and_false_leaves_the_bases():
    plain, module = fit_toy(toy(), ToyPoints()), fit_toy(toy(recalibrate_buffers=True), ToyPoints())
    assert torch.equal(plain.merged.parametrization.w, module.merged.parametrization.w)
    assert not plain.coefficients().buffers and "recalibrated_buffers" not in plain.coefficients().protocol
    with torch.no_grad():
        plain.merged.merge()
        module.merged.merge()
    for name, value in plain.merged.backbone.tensors().items():
        if name not in plain.merged.task_vectors:
            assert torch.equal(value, plain.merged.task_vectors.base[name])
    moved = module.merged.backbone.tensors()
    for name, value in module.coefficients().buffers.items():
        assert torch.equal(moved[name], value)
    for name in ("norm.num_batches_tracked", "unused.running_mean", "norm.weight"):
        assert torch.equal(moved[name], module.merged.task_vectors.base[name])
    network = module.merged.backbone.network
    assert not any(part.training or part._forward_pre_hooks for part in network.modules())


def test_a_second_fit_starts_from_the_bases_statistics():
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.merged.backbone.network.norm.running_mean.clone())

    module = toy(recalibrate_buffers=True)
    fit_toy(module, ToyPoints(), callbacks=[Look()])
    first = module.coefficients().buffers["norm.running_mean"]
    fit_toy(module, ToyPoints(), callbacks=[Look()])
    assert len(seen) == 6 and all(
        torch.equal(mean, module.merged.task_vectors.base["norm.running_mean"]) for mean in seen
    )
    assert not torch.equal(module.coefficients().buffers["norm.running_mean"], first)


def test_they_are_those_of_the_step_that_is_chosen(tmp_path):
    class Earliest(Selection):
        def value(self, look):
            return 0.0

    module, data = toy(lr=3.0, recalibrate_buffers=True), ToyPoints()
    fit_toy(module, data, callbacks=[KeepBest(Earliest()), CoefficientFile(tmp_path)])
    made = module.coefficients()
    assert made.step == 0 and float(module.merged.parametrization.w.detach().min()) == pytest.approx(0.3)
    for which, expected in zip(
        STATISTICS, moments(first_layer(module, torch.cat([points(data, task) for task in data.fitted]))), strict=True
    ):
        assert close(made.buffers[f"norm.{which}"], expected)
    _, sections = read_coefficients(tmp_path / "coefficients.safetensors")
    assert all(torch.equal(sections["buffer"][name], value) for name, value in made.buffers.items())


def test_labels_do_not_touch_them():
    found = [
        fit_toy(toy(recalibrate_buffers=True), ToyPoints(wrong_labels=wrong)).coefficients() for wrong in (False, True)
    ]
    assert len(found[0].buffers) == 4
    assert all(torch.equal(value, found[1].buffers[name]) for name, value in found[0].buffers.items())


def test_bilevel_has_it_too():
    module = bilevel(
        NormalisedToy(), normalised_vectors(), partial(Concrete, inner=LayerWise), Entropy(), recalibrate_buffers=True
    )
    data = ToyPoints()
    fit_toy(module, data)
    again = recalibrate(module.merged, data, SingleDeviceStrategy("cpu"))
    assert len(module.coefficients().buffers) == 4 and again["recalibrated_buffers"].startswith("4 running statistics")


def test_a_network_without_them_is_refused():
    with pytest.raises(ConfigError, match="ToyClassifier has no running statistics"):
        descending(ToyClassifier(), vectors_of(), LayerWise, Entropy(), recalibrate_buffers=True)
    assert not normalisations(ToyClassifier()) and len(normalisations(NormalisedToy())) == 3


def test_activations_that_are_not_finite_are_an_error_and_leave_the_bases():
    module, data = toy(init=1e38), ToyPoints()
    data.serve(module.merged.backbone)
    before = module.merged.backbone.network.norm.running_mean.clone()
    with pytest.raises(DivergedError, match=r"norm\.running_(mean|var)' cannot be recomputed"):
        recalibrate(module.merged, data, SingleDeviceStrategy("cpu"))
    assert torch.equal(module.merged.backbone.network.norm.running_mean, before) and not module.merged.recalibrated


# a ResNet of transformers, with each expert's own head


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    root = tmp_path_factory.mktemp("resnet")
    pool = pico_pool("resnet", root / "pool")
    tasks = {}
    for seed, (task, classes) in enumerate((("one", ["a", "b", "c"]), ("two", ["a", "b", "c", "d"]))):
        splits = {"train": noise_images(classes, 40, seed), "test": noise_images(classes, 12, 10 + seed)}
        datasets.DatasetDict(splits).save_to_disk(root / task)
        tasks[task] = str(root / task)
    return pool, tasks


def images(tasks):
    found = {task: ImageTask(folder, ["{}"]) for task, folder in tasks.items()}
    return ImageCalibration(tasks=found, batch_size=4, eval_batch_size=20, calibration_fraction=0.8)


@pytest.fixture(scope="module")
def fitted(resnet, tmp_path_factory):
    """Module, data and the folder with its coefficient file."""
    pool, tasks = resnet
    vectors = TaskVectors(pool["base"], pool["experts"], exclude=pool["exclude"])
    module = descending(
        pool["backbone"](), vectors, partial(LayerWise, init=0.3), Entropy(), 0.1, recalibrate_buffers=True
    )
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        data = images(tasks)
        Trainer(max_steps=2, max_epochs=1, callbacks=[CoefficientFile(folder)], **QUIET).fit(module, data)
    return module, data, folder


def test_the_first_layer_of_a_resnet_in_float64(fitted):
    """32 calibration samples of each of two tasks, ten at a time: four batches, all of them once."""
    module, data, folder = fitted
    loaded = load_coefficients(folder / "coefficients.safetensors")
    vectors, backbone = loaded.task_vectors, module.merged.backbone
    name = FIRST.replace("normalization", "convolution.weight")
    w = loaded.table()[name]
    weight = vectors.base[name].double()
    for task, expert in vectors.checkpoints.items():
        weight = weight + w[task][0] * (expert[name].double() - vectors.base[name].double())
    pixels = torch.cat([points(data, task) for task in data.fitted])
    assert len(pixels) == 64 and "4 batches of 8 calibration" in loaded.protocol["recalibrated_buffers"]
    given = functional.conv2d(backbone.images.normalise(pixels).double(), weight, stride=2, padding=3)
    for which, expected in zip(STATISTICS, moments(given), strict=True):
        assert close(loaded.buffers[f"{FIRST}.{which}"], expected)
        assert not close(vectors.base[f"{FIRST}.{which}"], expected, 1e-2)


@pytest.mark.slow
def test_a_stranger_loads_them_and_computes_what_the_trainer_computed(fitted, resnet, tmp_path):
    module, data, folder = fitted
    loaded = load_coefficients(folder / "coefficients.safetensors")
    place = tmp_path / "case"
    export(loaded, place / "model", task="two")
    samples = data.samples("two", "test")
    inputs = torch.stack([samples[index] for index in range(6)])
    with torch.no_grad():
        module.merged.merge()
        logits = module.merged.backbone.output(module.merged(inputs), "two").logits
    question = {"inputs": {"pixel_values": module.merged.backbone.images.normalise(inputs)}, "head": None}
    torch.save(question | {"loader": "AutoModelForImageClassification"}, place / "question.pt")
    script = ROOT / "tests" / "backbones" / "parity.py"
    run = subprocess.run([sys.executable, script, tmp_path], env=environment(), timeout=120, check=False)
    assert run.returncode == 0
    answer = torch.load(place / "answer.pt")
    assert answer["problems"] == {} and answer["buffers"].keys() == loaded.buffers.keys()
    assert all(torch.equal(answer["buffers"][name], value) for name, value in loaded.buffers.items())
    assert (answer["logits"] - logits).abs().max() <= 1e-5 * max(1.0, float(logits.abs().max()))
    written, base = load_file(place / "model" / "model.safetensors"), loaded.task_vectors.base
    assert torch.equal(written[f"{FIRST}.num_batches_tracked"], base[f"{FIRST}.num_batches_tracked"])
    expert = loaded.task_vectors.checkpoints["two"]
    assert torch.equal(written["classifier.1.weight"], expert["classifier.1.weight"]), "heads are the expert's"
    assert "recalibrated_buffers: 1" in (place / "model" / "README.md").read_text()
    models = {task: model.location for task, model in loaded.task_vectors.checkpoints.items()}
    again = load_coefficients(place / "model" / COEFFICIENTS_FILE, base.location, models)
    assert all(torch.equal(again.buffers[name], value) for name, value in loaded.buffers.items())


def test_evaluation_is_that_of_the_file(fitted, resnet):
    """The trainer's own scores, and those of a scorer that has just scored an expert with the same network."""
    module, data, folder = fitted
    (logged,) = [Trainer(**QUIET).test(module, data, verbose=False)]
    logged = {key: value for part in logged for key, value in part.items()}
    loaded = load_coefficients(folder / "coefficients.safetensors")
    scorer = Scorer(resnet[0]["backbone"](), images(resnet[1]), loaded.task_vectors, "test")
    scorer.experts()
    scores = means(scorer.of(loaded))
    assert scores == {task: pytest.approx(logged[f"test/accuracy/{task}"], abs=1e-6) for task in ("one", "two")}
    found = scorer.backbone.tensors()
    assert all(torch.equal(found[name], value) for name, value in loaded.buffers.items())
    scorer.base()
    assert all(torch.equal(found[name], loaded.task_vectors.base[name]) for name in loaded.buffers)


def test_the_same_bytes_again(fitted, tmp_path):
    _, _, folder = fitted
    save_coefficients(load_coefficients(folder / "coefficients.safetensors"), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "coefficients.safetensors").read_bytes()


@pytest.fixture
def pool_file(resnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    without_pictures(monkeypatch)
    pool, tasks = resnet
    config = {
        "model": {
            "backbone": {"class_path": "adamerge.backbones.ImageClassifier", "init_args": {"model": pool["base"]}},
            "task_vectors": {key: pool[key] for key in ("base", "experts", "exclude")},
        },
        "data": {
            "class_path": "adamerge.data.ImageCalibration",
            "init_args": {"tasks": {task: {"dataset": folder, "templates": ["{}"]} for task, folder in tasks.items()}},
        },
    }
    return write_yaml(tmp_path / "pool.yaml", config)


def test_the_command_line(pool_file, capfd):
    """Fit, look at it, and resume what is done: the file is the same."""
    words = fit_words(pool_file, "--name=n", "--id=a", "--model.recalibrate_buffers=true")
    assert command(capfd, "fit", *words).code == 0
    run = Path("runs/n/a")
    before = (run / "coefficients.safetensors").read_bytes()
    shown = command(capfd, "inspect", run)
    assert shown.code == 0 and "buffers: 12 recomputed" in shown.out and f"{FIRST}.running_var" in shown.out
    assert command(capfd, "fit", "--resume", run).code == 0
    assert (run / "coefficients.safetensors").read_bytes() == before
    assert command(capfd, "test", run).code == 0
    assert "labels never read" in json.loads((run / "summary.json").read_text())["protocol"]["recalibrated_buffers"]


def test_task_arithmetic_opens_data_for_them_alone(pool_file, capfd):
    for name, words in (("with", ["--model.recalibrate_buffers=true"]), ("without", [])):
        words = fit_words(pool_file, "--name=n", f"--id={name}", *words, method=TASK_ARITHMETIC)
        assert command(capfd, "fit", *words).code == 0
    with_them, without = (
        read_coefficients(Path(f"runs/n/{name}/coefficients.safetensors")) for name in ("with", "without")
    )
    assert len(with_them[1]["buffer"]) == 12 and not without[1]["buffer"]
    assert torch.equal(*(found[1]["w"]["model"] for found in (with_them, without))) and without[0]["protocol"] == {}
    assert with_them[0]["protocol"]["transductive"] is False and with_them[0]["step"] == 0
    assert json.loads(Path("runs/n/with/summary.json").read_text())["protocol"] == with_them[0]["protocol"]


def test_without_normalisation_nothing_is_written(pool_file, resnet, pool, image_folders, capfd, tmp_path):
    from running import pool_config

    file = write_yaml(tmp_path / "clip.yaml", pool_config(pool, image_folders))
    outcome = command(capfd, "fit", *fit_words(file, "--name=n", "--model.recalibrate_buffers=true"))
    assert outcome.code == 2 and "OpenClipClassifier has no running statistics" in outcome.error
    assert not Path("runs").exists()


SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import torch
from lightning import Trainer
from training.test_batchnorm import QUIET, ToyPoints, toy

torch.set_num_threads(1)
module = toy(lr=1e-9, recalibrate_buffers=True)  # the same coefficients, whatever the gradients' rounding
parallel = {"devices": 2, "strategy": "ddp"} if sys.argv[3] == "both" else {"devices": 1}
trainer = Trainer(**QUIET, max_steps=3, max_epochs=1, **parallel)
trainer.fit(module, ToyPoints(eval_batch_size=30, rows=41))
torch.save(module.coefficients().buffers, f"{sys.argv[3]}_{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Three batches of 14 of each task: 7 on each process, which normalise with what both have seen."""
    (tmp_path / "fit.py").write_text(SCRIPT)
    tests = Path(__file__).parents[1]
    for name in ("alone", "both"):
        done = child([tmp_path / "fit.py", tests, tests / "modules", name], tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone_0", "both_0", "both_1"))
    assert alone.keys() == first.keys() == second.keys() and len(alone) == 4
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]) and close(first[name], value.double(), 1e-6)
