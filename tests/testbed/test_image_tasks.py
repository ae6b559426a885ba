"""The testbed's tasks: splits that share no image, the promised sizes, the same bytes every time."""

import hashlib
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from adamerge.testbed.image_tasks import IMAGE_TASKS, load_image_task, task_images

SPLITS = ("train", "calibration", "validation", "test")
AT_LEAST = {"train": 3000, "calibration": 500, "validation": 250, "test": 1000}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Drawing gains little from threads, and loses much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def drawn(name: str):
    return {split: task_images(IMAGE_TASKS[name], split) for split in SPLITS}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_no_image_is_in_two_splits_or_twice_in_one(name):
    hashes = [
        hashlib.sha256(image.numpy().tobytes()).digest() for images, _ in drawn(name).values() for image in images
    ]
    assert len(set(hashes)) == len(hashes)


QUICKLY = {"digits", "latin"}
SOME = [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in IMAGE_TASKS]


@pytest.mark.parametrize("name", SOME)
def test_sizes_and_classes(name):
    for split, (images, labels) in drawn(name).items():
        assert len(images) == len(labels) >= AT_LEAST[split]
        assert images.shape[1] in (1, 3) and images.shape[2:] == (28, 28)
        assert set(labels.tolist()) == set(range(len(IMAGE_TASKS[name].classnames)))


def test_names_are_unique_and_templates_take_one_name():
    assert len(IMAGE_TASKS) >= 6
    for name, task in IMAGE_TASKS.items():
        assert name == task.name
        assert len(set(task.classnames)) == len(task.classnames)
        assert all(template.count("{}") == 1 for template in task.templates)
    assert len({task.seed for task in IMAGE_TASKS.values()}) == len(IMAGE_TASKS)


def test_loaded_data_are_the_drawn_ones_and_the_second_call_reads_the_cache(tmp_path):
    data = load_image_task("latin", tmp_path)
    assert tuple(data) == SPLITS
    assert data["test"].features["label"].names == list(IMAGE_TASKS["latin"].classnames)
    images, labels = drawn("latin")["test"]
    assert data["test"]["label"][:] == labels.tolist()
    assert data["test"][7]["image"].tobytes() == images[7].numpy().tobytes()
    (folder,) = tmp_path.iterdir()  # the stage was renamed, nothing else is left
    made = folder.stat().st_mtime_ns
    assert load_image_task("latin", tmp_path)["test"][7]["image"].tobytes() == images[7].numpy().tobytes()
    assert folder.stat().st_mtime_ns == made


@pytest.mark.slow
def test_the_same_bytes_under_another_hash_seed():
    code = (
        "import hashlib; from adamerge.testbed.image_tasks import IMAGE_TASKS, task_images\n"
        "for name in ('textures', 'greek'):\n"
        "    images, labels = task_images(IMAGE_TASKS[name], 'validation')\n"
        "    print(hashlib.sha256(images.numpy().tobytes() + bytes(labels.tolist())).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = []
    for name in ("textures", "greek"):
        images, labels = drawn(name)["validation"]
        here.append(hashlib.sha256(images.numpy().tobytes() + bytes(labels.tolist())).hexdigest())
    assert run.stdout.split() == here


def test_an_unknown_task_says_which_there_are():
    with pytest.raises(KeyError, match="digits"):
        load_image_task("cars")
