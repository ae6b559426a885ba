"""The script that makes the testbed, at a few steps; and the shipped files: hashes, size, open_clip's own loading."""

import hashlib
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import adamerge.testbed
from adamerge.testbed import make_images
from adamerge.testbed.image_tasks import IMAGE_TASKS, task_images

SHIPPED = Path(adamerge.testbed.__file__).parent / "checkpoints" / "images"
TINY = make_images.Recipe(pretrain_steps=4, pretrain_images=60, pretrain_batch=16, finetune_steps=2, finetune_batch=16)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Batches this small gain nothing from threads, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("images")
    tasks = {name: IMAGE_TASKS[name] for name in ("digits", "latin")}
    base = make_images.pretrain(TINY, out, tasks)
    experts = {name: make_images.finetune(base, task, TINY, out) for name, task in tasks.items()}
    make_images.write(base, experts, out)
    return out, base, experts


@pytest.mark.slow
def test_experts_hold_the_image_tower_and_moved(made):
    _, base, experts = made
    for visual in experts.values():
        assert set(visual) == {name for name in base if name.startswith("visual.")}
        assert any(not torch.equal(tensor, base[name]) for name, tensor in visual.items())


def test_a_killed_run_goes_on_from_its_partial_file(tmp_path, monkeypatch):
    tasks = {"digits": IMAGE_TASKS["digits"]}
    recipe = replace(TINY, checkpoint_every=2)

    def killed(state, file):
        torch.save(state, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_images, "save", killed)
        make_images.pretrain(recipe, tmp_path, tasks)
    assert torch.load(tmp_path / "base.partial.pt", weights_only=True)["step"] == 2
    make_images.pretrain(recipe, tmp_path, tasks)
    assert (tmp_path / "base.pt").is_file() and not (tmp_path / "base.partial.pt").exists()


def test_what_is_written_is_read_back_as_rounded(made):
    out, base, experts = made
    read_base, read_experts = make_images.read(out)
    assert set(read_experts) == set(experts)
    for name, tensor in base.items():
        assert torch.equal(read_base[name], tensor.half().float())


@pytest.mark.slow
def test_results_hold_the_three_averages(made, monkeypatch):
    out, _, _ = made
    monkeypatch.setattr(make_images, "LAMBDAS", (0.0, 0.5))
    results = make_images.evaluate(*make_images.read(out), split="validation")
    assert set(results["averages"]) == {"pretrained", "task_arithmetic", "individual"}
    assert results["averages"]["task_arithmetic"] >= results["averages"]["pretrained"]


def test_the_shipped_hashes_match_and_the_files_are_small():
    lines = (SHIPPED / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [file for folder in ("base", "experts") for file in (SHIPPED / folder).iterdir()]
    assert {file.relative_to(SHIPPED).as_posix() for file in files} == set(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == digest, name
    assert sum(file.stat().st_size for file in files) <= 16_000_000


def test_the_shipped_base_loads_through_open_clip_and_the_experts_fit_it():
    source = f"local-dir:{SHIPPED / 'base'}"
    model, _, preprocess = open_clip.create_model_and_transforms(source, require_pretrained=True)
    tensors = model.state_dict()
    for name in IMAGE_TASKS:
        with safe_open(SHIPPED / "experts" / f"{name}.safetensors", framework="pt") as expert:
            assert set(expert.keys()) == {key for key in tensors if key.startswith("visual.")}
    images, _ = task_images(IMAGE_TASKS["textures"], "validation")
    picture = Image.fromarray(images[0, 0].numpy())
    assert torch.allclose(preprocess(picture), make_images.normalise(images[:1])[0], atol=1e-6)


def test_the_shipped_experts_are_better_than_the_base_on_their_task():
    base, experts = make_images.read(SHIPPED)
    task = IMAGE_TASKS["greek"]
    model = make_images.create_model().eval()
    model.load_state_dict(base)
    head, data = make_images.zero_shot_head(model, task), task_images(task, "validation")
    pretrained = make_images.accuracy(model, head, *data)
    model.load_state_dict({**base, **experts["greek"]})
    assert make_images.accuracy(model, head, *data) > pretrained + 10
