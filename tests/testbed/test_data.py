"""The testbed's data module: seven tasks, inputs as the base takes them, labels that calibration never reads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import adamerge.testbed
from adamerge import TestbedImages
from adamerge.backbones import OpenClipClassifier
from adamerge.errors import DataError
from adamerge.testbed.image_tasks import IMAGE_TASKS, task_images

BASE = Path(adamerge.testbed.__file__).parent / "checkpoints" / "images" / "base"
TWO = {
    name: IMAGE_TASKS[name] for name in ("textures", "photos")
}  # grey and colour; all seven would take half a minute
SIZES = {"train": 4000, "calibration": 600, "validation": 250, "test": 1000}


@pytest.fixture(autouse=True)
def _one_thread():
    """Drawing gains little from threads, and loses much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone():
    return OpenClipClassifier(str(BASE))


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr("adamerge.testbed.image_tasks.IMAGE_TASKS", TWO)


def served(backbone, kind=TestbedImages, **arguments) -> TestbedImages:
    """The data, for a trainer of four steps."""
    data = kind(batch_size=8, **arguments)
    data.serve(backbone)
    data.trainer = SimpleNamespace(max_steps=4, global_rank=0, world_size=1, global_step=0)
    return data


def test_the_seven_tasks_are_there_without_building_any(monkeypatch):
    monkeypatch.setattr(TestbedImages, "load", lambda self, task: pytest.fail("nothing is drawn before it is needed"))
    tasks = TestbedImages().tasks
    assert list(tasks) == ["digits", "textures", "photos", "latin", "greek", "cyrillic", "symbols"]
    for task in tasks.values():
        assert task.classnames and all("{}" in template for template in task.templates)


@pytest.mark.slow
def test_inputs_are_bytes_of_the_size_that_the_base_takes(backbone):
    data = served(backbone)
    for task in TWO:
        samples = data.samples(task, "validation")
        assert len(samples) == SIZES["validation"]
        assert samples[0].dtype == torch.uint8 and samples[0].shape == (3, 28, 28)
        images, labels = task_images(IMAGE_TASKS[task], "validation")
        for index in (0, 17, 249):
            assert torch.equal(samples[index], images[index].expand(3, 28, 28)), "neither cropped nor resampled"
        assert list(map(int, data.labels(task, "validation"))) == labels.tolist()
    assert backbone.encode(samples[0][None]).features.shape == (1, 96)


def test_batches_of_every_task_without_labels(two, backbone):
    batches = list(served(backbone).train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert list(batch) == list(TWO)
        assert all(part.inputs.shape == (8, 3, 28, 28) and part.inputs.dtype == torch.uint8 for part in batch.values())
        assert all(part.labels is None for part in batch.values())


class Blind(TestbedImages):
    """No labels in the calibration split."""

    def load(self, task):
        splits = dict(super().load(task))
        return {**splits, "calibration": splits["calibration"].remove_columns("label")}


class Sealed(TestbedImages):
    """Labels may not be asked for at all."""

    def labels(self, task, split):
        pytest.fail(f"the labels of task '{task}', {split} split, were read")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Blind, Sealed])
def test_labels_are_never_read_for_calibration(kind, two, backbone):
    plain, other = (list(served(backbone, which).train_dataloader()) for which in (TestbedImages, kind))
    for ours, theirs in zip(plain, other, strict=True):
        assert all(torch.equal(ours[task].inputs, theirs[task].inputs) for task in TWO)


def test_a_labelled_objective_gets_them(two, backbone):
    data = served(backbone, labelled=True)
    batch = next(iter(data.train_dataloader()))
    known: dict[str, dict[bytes, int]] = {}
    for task in TWO:
        samples, labels = data.samples(task, "calibration"), data.labels(task, "calibration")
        known[task] = {samples[index].numpy().tobytes(): label for index, label in enumerate(labels)}
    for task, part in batch.items():
        assert part.labels.tolist() == [known[task][sample.numpy().tobytes()] for sample in part.inputs]
    with pytest.raises(DataError, match="calibration split has no labels"):
        served(backbone, Blind, labelled=True).train_dataloader()


def test_the_protocol_says_which_inputs_are_used(two):
    wanted = {
        "calibration_split": "calibration, labels never read",
        "transductive": False,
        "calibration_samples": dict.fromkeys(TWO, 600),
        "test_samples": dict.fromkeys(TWO, 1000),
        "seed": 0,
    }
    protocol = TestbedImages().protocol
    assert {name: protocol[name] for name in wanted} == wanted
    fewer = TestbedImages(transductive=True, calibration_samples=50, seed=3).protocol
    assert fewer["calibration_split"] == "test, labels never read" and fewer["transductive"] and fewer["seed"] == 3
    assert fewer["calibration_samples"] == dict.fromkeys(TWO, 50) and fewer["test_samples"] == dict.fromkeys(TWO, 1000)


def test_the_splits_have_their_sizes_and_evaluation_keeps_their_order(two, backbone):
    data = served(backbone, eval_batch_size=100)
    for task in TWO:
        assert {split: len(data.rows(task, split)) for split in SIZES} == SIZES
    for task, loader in zip(TWO, data.val_dataloader(), strict=True):
        parts = list(loader)
        assert [len(part.inputs) for part in parts] == [100, 100, 50]
        assert torch.cat([part.labels for part in parts]).tolist() == list(map(int, data.labels(task, "validation")))
