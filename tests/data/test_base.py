"""Calibration data: the order of batches, ranks, decoding once, splits, the protocol, and errors."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import CLASSES, noise_images
from lightning import LightningModule, Trainer
from torchvision.transforms.functional import pil_to_tensor

from adamerge import Calibration
from adamerge.backbones import Batch
from adamerge.data.batch_order import Steps, StepSampler, seed_of
from adamerge.errors import ConfigError, DataError


class Pictures:
    """Stands for a backbone: what Calibration needs of one."""

    def __init__(self) -> None:
        self.decoded = Counter()

    def check_tasks(self, tasks) -> None:
        return

    def preprocess(self, sample):
        tensor = pil_to_tensor(sample)
        self.decoded[tensor.numpy().tobytes()] += 1
        return tensor


class Words:
    templates = ("{}",)

    def __init__(self, names) -> None:
        self.classnames = names


class Noise(Calibration):
    """Two tasks made of noise."""

    sizes = {"train": 9, "calibration": 20, "validation": 7, "test": 11}

    @property
    def tasks(self):
        return {task: Words(names) for task, names in CLASSES.items()}

    def load(self, task):
        start = 100 * list(CLASSES).index(task)
        return {
            split: noise_images(CLASSES[task], size, start + seed)
            for seed, (split, size) in enumerate(self.sizes.items())
        }


@pytest.fixture
def pictures():
    return Pictures()


def served(pictures, **arguments) -> Noise:
    data = Noise(**arguments)
    data.serve(pictures)
    return data


def steps(data: Noise, total: int, rank: int = 0, world: int = 1) -> Steps:
    samples = {task: data.samples(task, "calibration") for task in data.tasks}
    return Steps(samples, None, batch_size=data.batch_size, seed=data.seed, total=total, rank=rank, world_size=world)


class Idle(LightningModule):
    """Sees the batches and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.w * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return []


def batches_of(data: Noise, total: int) -> list[dict[str, Batch]]:
    """What a trainer hands to the module."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module = Idle()
    module.merged = type("Merged", (), {"backbone": data._backbone})()
    trainer = Trainer(max_steps=total, max_epochs=1, accelerator="cpu", limit_val_batches=0, **quiet)
    trainer.fit(module, data)
    return module.seen


@pytest.mark.slow
def test_a_kind_of_data_is_known_without_trainers_networks_and_data_sets():
    heavy = ["lightning", "torchmetrics", "datasets", "transformers", "open_clip", "torchvision"]
    code = (
        "import sys, adamerge.data as data, adamerge.testbed.data as testbed\n"
        "tasks = {'one': data.LanguageTask('lines.txt')}\n"
        "kinds = [data.LanguageCalibration(tasks=tasks, batch_size=2), data.NoData(), testbed.TestbedImages(), "
        "data.ImageCalibration(tasks={'one': data.ImageTask('x')}), data.TextCalibration(tasks={'a': data.TextTask('x')})]\n"
        f"print([name for name in {heavy} if name in sys.modules], 'torch' in sys.modules, list(kinds[0].tasks))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "[] True ['one']"


def test_seeds_are_the_same_in_every_process():
    # a number from another process; Python's own hash would change
    assert seed_of(0, "colours", 3) == seed_of(0, "colours", 3) != seed_of(0, "colours", 4)
    assert seed_of(0, "a") == int.from_bytes(hashlib.sha256(b"(0, 'a')").digest()[:8], "little") >> 1
    assert all(0 <= seed_of(n) < 1 << 63 for n in range(100))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 20, 33])
def test_each_pass_covers_every_sample_once(batch_size, pictures):
    table = steps(served(pictures, batch_size=batch_size), 60)
    for task in CLASSES:
        row = [index for step in range(60) for index in table.indices(task, step)]
        for start in range(0, len(row) - 20, 20):
            assert sorted(row[start : start + 20]) == list(range(20))
        assert row[:20] != list(range(20)) and row[:20] != row[20:40], "shuffled, and anew"


def test_order_is_a_function_of_seed_and_step_alone(pictures):
    data = served(pictures, batch_size=6)
    forwards = [steps(data, 30).indices("shapes", step) for step in range(30)]
    table = steps(data, 30)
    backwards = [table.indices("shapes", step) for step in reversed(range(30))]
    assert forwards == backwards[::-1], "asking in another order changes nothing"
    torch.manual_seed(9)
    torch.rand(7)
    assert steps(data, 99).indices("shapes", 3) == forwards[3], "nor do global randomness and the length of the run"
    assert steps(served(pictures, batch_size=6, seed=1), 30).indices("shapes", 3) != forwards[3]
    assert table.indices("colours", 0) != table.indices("shapes", 0), "tasks are shuffled apart"


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_part_the_batch(world, pictures):
    data = served(pictures, batch_size=7)
    whole = steps(data, 9)
    parts = [steps(data, 9, rank, world) for rank in range(world)]
    for step in range(9):
        for task in CLASSES:
            together = torch.cat([part[step][task].inputs for part in parts])
            expected = whole[step][task].inputs
            assert sorted(map(hash_of, together)) == sorted(map(hash_of, expected))
            sizes = [len(part[step][task].inputs) for part in parts]
            assert max(sizes) - min(sizes) <= 1


def hash_of(image: torch.Tensor) -> bytes:
    return image.numpy().tobytes()


def test_a_batch_smaller_than_the_number_of_ranks_is_a_typed_error(pictures):
    with pytest.raises(ConfigError, match="batch_size 1 is shared by 2 processes"):
        steps(served(pictures, batch_size=1), 5, rank=1, world=2)


def test_the_sampler_starts_where_the_run_is_and_counts_what_is_done():
    done = 0
    sampler = StepSampler(lambda: done, 10)
    assert list(sampler) == list(range(10)) and len(sampler) == 10
    done = 7
    assert list(sampler) == [7, 8, 9] and len(sampler) == 10


def test_a_trainer_gets_the_batches_of_the_table(pictures):
    data = served(pictures, batch_size=6)
    seen = batches_of(data, 8)
    table = steps(data, 8)
    assert len(seen) == 8
    for step, batch in enumerate(seen):
        assert list(batch) == list(CLASSES)
        for task, part in batch.items():
            assert part.labels is None and torch.equal(part.inputs, table[step][task].inputs)


def test_workers_change_nothing(pictures):
    alone = batches_of(served(pictures, batch_size=6), 7)
    helped = batches_of(served(pictures, batch_size=6, workers=2), 7)
    assert len(alone) == len(helped) == 7
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(one[task].inputs, other[task].inputs) for task in CLASSES)


def test_each_sample_is_decoded_once(pictures):
    data = served(pictures, batch_size=6)
    batches_of(data, 12)
    batches_of(data, 12)
    for task in CLASSES:
        for split in ("validation", "test"):
            for _ in range(2):
                assert sum(len(batch.inputs) for batch in data.eval_dataloader(task, split)) == data.sizes[split]
    assert set(pictures.decoded.values()) == {1}
    assert len(pictures.decoded) == 2 * (20 + 7 + 11)


def test_evaluation_keeps_rows_and_labels_together(pictures):
    data = served(pictures, eval_batch_size=4)
    rows = data.load("shapes")["test"]
    batches = list(data.eval_dataloader("shapes", "test"))
    assert [len(batch.inputs) for batch in batches] == [4, 4, 3]
    assert torch.cat([batch.labels for batch in batches]).tolist() == rows["label"]
    images = torch.cat([batch.inputs for batch in batches])
    assert all(torch.equal(image, pil_to_tensor(row["image"])) for image, row in zip(images, rows, strict=True))
    assert [len(loader.dataset) for loader in data.val_dataloader()] == [7, 7]
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [11, 11]


def test_labels_of_unlabelled_data_are_never_read(pictures, monkeypatch):
    def refuse(self, task, split):
        raise AssertionError("labels were asked for")

    monkeypatch.setattr(Calibration, "labels", refuse)
    data = served(pictures, batch_size=6)
    assert all(batch[task].labels is None for batch in batches_of(data, 3) for task in CLASSES)
    assert data.samples("colours", "calibration").rows.column_names == ["image"]


def test_labelled_batches_carry_the_labels_of_their_rows(pictures):
    data = served(pictures, batch_size=6, labelled=True)
    by_image = {
        task: {hash_of(pil_to_tensor(row["image"])): row["label"] for row in data.rows(task, "calibration")}
        for task in CLASSES
    }
    for batch in batches_of(data, 5):
        for task, part in batch.items():
            assert part.labels.tolist() == [by_image[task][hash_of(image)] for image in part.inputs]
    assert "labelled" in data.protocol["calibration_split"]


def test_transductive_calibrates_on_test_inputs_and_says_so(pictures):
    inductive, transductive = served(pictures), served(pictures, transductive=True)
    for task in CLASSES:
        test = {hash_of(pil_to_tensor(row["image"])) for row in inductive.rows(task, "test")}
        own = {hash_of(image) for image in map(inductive.samples(task, "calibration").__getitem__, range(20))}
        papers = {hash_of(image) for image in map(transductive.samples(task, "calibration").__getitem__, range(11))}
        assert not own & test and papers == test
    assert inductive.protocol["transductive"] is False and inductive.protocol["calibration_split"].startswith("calib")
    assert transductive.protocol["transductive"] is True and transductive.protocol["calibration_split"].startswith(
        "test"
    )
    assert transductive.protocol["calibration_samples"] == {"colours": 11, "shapes": 11}


def test_calibration_samples(pictures):
    few = served(pictures, calibration_samples=5)
    assert [len(few.rows(task, "calibration")) for task in CLASSES] == [5, 5]
    assert few.protocol["calibration_samples"] == {"colours": 5, "shapes": 5}
    assert len(few.rows("colours", "test")) == 11, "other splits keep theirs"
    again, other = served(pictures, calibration_samples=5), served(pictures, calibration_samples=5, seed=1)
    assert few.rows("colours", "calibration")["label"] == again.rows("colours", "calibration")["label"]
    chosen = [hash_of(few.samples("colours", "calibration")[n]) for n in range(5)]
    assert len(set(chosen)) == 5
    assert set(chosen) != {hash_of(other.samples("colours", "calibration")[n]) for n in range(5)}
    more = served(pictures, calibration_samples=999)
    assert len(more.rows("colours", "calibration")) == 20
    both = served(pictures, calibration_samples=5, transductive=True)
    assert len(both.rows("colours", "calibration")) == 5 and len(both.rows("colours", "test")) == 11


def test_calibration_samples_are_nested(pictures):
    """More samples contain fewer, so that a study of their number compares like with like."""
    five, nine = (served(pictures, calibration_samples=n).samples("colours", "calibration") for n in (5, 9))
    assert {hash_of(five[n]) for n in range(5)} <= {hash_of(nine[n]) for n in range(9)}


@pytest.mark.parametrize("size", [0, None])
def test_empty_and_missing_splits(size, pictures, monkeypatch):
    sizes = {"train": 9, "calibration": size, "validation": 7, "test": 11}
    monkeypatch.setattr(Noise, "sizes", {name: n for name, n in sizes.items() if n is not None})
    with pytest.raises(DataError, match=r"task 'colours': the calibration split is (empty|missing)"):
        served(pictures).rows("colours", "calibration")


def test_without_a_backbone_or_a_length_there_is_no_loader(pictures):
    with pytest.raises(ConfigError, match="backbone"):
        Noise().samples("colours", "test")
    with pytest.raises(ConfigError, match="max_steps"):
        served(pictures).train_dataloader()


def test_shots_are_k_of_each_class_and_nested(pictures):
    """Twenty noise images of three or four classes."""
    chosen = {}
    for shots in (1, 2):
        data = served(pictures, labelled=True, shots=shots)
        for task, names in CLASSES.items():
            rows = data.rows(task, "calibration")
            assert Counter(rows["label"]) == dict.fromkeys(range(len(names)), shots)
            assert len(data.samples(task, "calibration")) == shots * len(names) == len(data.labels(task, "calibration"))
            chosen[task, shots] = {image.tobytes() for image in rows["image"]}
            assert len(data.rows(task, "validation")) == data.sizes["validation"], "the other splits are whole"
        assert data.protocol["shots"] == shots
    assert all(chosen[task, 1] < chosen[task, 2] for task in CLASSES)


def test_shots_are_a_function_of_the_seed(pictures):
    def chosen(seed):
        rows = served(pictures, labelled=True, shots=1, seed=seed).rows("shapes", "calibration")
        return [image.tobytes() for image in rows["image"]]

    assert chosen(0) == chosen(0) != chosen(1)


def test_shots_need_labels_and_as_many_samples(pictures):
    with pytest.raises(ConfigError, match="chosen by their labels"):
        Noise(shots=1)
    with pytest.raises(DataError, match="fewer samples than shots"):
        served(pictures, labelled=True, shots=15).rows("shapes", "calibration")


def test_only_some_tasks_are_calibrated_on(pictures):
    data = served(pictures, only=["shapes"])
    assert list(batches_of(data, 1)[0]) == ["shapes"] == data.fitted == data.labelled_tasks("validation")
    assert data.labelled_tasks("test") == list(data.tasks) == list(CLASSES), "all are tested"
    assert list(data.protocol["calibration_samples"]) == ["shapes"]
    for only, what in ((["shades"], "'shades'"), ([], "no task")):
        with pytest.raises(ConfigError, match=what):
            served(pictures, only=only).check(pictures)


def test_a_course_says_what_a_fit_is_going_to_see_without_labels(pictures):
    data = served(pictures, only=["shapes"], batch_size=5)
    batches_of(data, 3)
    course = data.course()
    assert (course.steps, course.batch_size, course.classes) == (3, 5, {"shapes": 4})
    assert len(course.samples["shapes"]) == 20 and torch.is_tensor(course.samples["shapes"][0])
