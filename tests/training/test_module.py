"""What every search shares: validation accuracy per task, the warm start."""

import pytest
import torch
from conftest import CLASSES
from lightning import LightningDataModule, Trainer
from modules import descending

from adamerge.artifacts.coefficients import save_coefficients
from adamerge.backbones import OpenClipClassifier
from adamerge.errors import CoefficientsError, ConfigError
from adamerge.objectives import Entropy
from adamerge.parametrizations import LayerWise, TaskWise
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.evaluation import means, score
from adamerge.transforms import Combine

from .test_descent import QUIET, fitted, images, module_of, w


def test_validation_accuracy_per_task_is_logged(pool, image_folders):
    module, data = module_of(pool), images(image_folders)
    trainer = Trainer(max_steps=2, max_epochs=1, log_every_n_steps=1, **QUIET)
    trainer.fit(module, data)
    logged = {key: float(value) for key, value in trainer.logged_metrics.items() if key.startswith("validation/")}
    assert logged.keys() == {"validation/accuracy", *(f"validation/accuracy/{task}" for task in CLASSES)}
    with torch.no_grad():
        module.merged.merge()
    expected = means(
        {task: score(module.merged, task, data.eval_dataloader(task, "validation"), data.metric) for task in CLASSES}
    )
    for task in CLASSES:
        assert logged[f"validation/accuracy/{task}"] == pytest.approx(expected[task], abs=1e-6)
    assert logged["validation/accuracy"] == pytest.approx(sum(expected.values()) / 2, abs=1e-6)


def test_test_stage(pool, image_folders):
    module, data = module_of(pool), images(image_folders)
    logged = {}
    for part in Trainer(**QUIET).test(module, data, verbose=False):
        logged |= part
    with torch.no_grad():
        module.merged.merge()
    for task in CLASSES:
        hits = score(module.merged, task, data.eval_dataloader(task, "test"), data.metric)
        assert logged[f"test/accuracy/{task}"] == pytest.approx(float(hits.float().mean()), abs=1e-6)


def test_validating_in_between_does_not_disturb_the_fit(pool, image_folders):
    quiet = w(fitted(module_of(pool), images(image_folders), steps=4))
    module = module_of(pool)
    trainer = Trainer(max_steps=4, max_epochs=1, val_check_interval=1, **QUIET)
    trainer.fit(module, images(image_folders))
    assert torch.equal(w(module), quiet)


def test_the_heads_are_the_bases(pool, image_folders):
    """Built once, from the base's text tower, whatever the coefficients are by then."""
    module, data = module_of(pool), images(image_folders)
    fitted(module, data, steps=1)
    before = {task: head.weight.clone() for task, head in module.merged.backbone.heads.items()}
    fitted(module, data, steps=3)
    assert all(torch.equal(head.weight, before[task]) for task, head in module.merged.backbone.heads.items())


def test_labels_do_not_touch_an_unlabelled_fit(pool, image_folders, tmp_path):
    import datasets

    found = [w(fitted(module_of(pool), images(image_folders)))]
    for how in (lambda row: {"label": 0}, lambda row: {"label": (row["label"] + 1) % 3}):
        folders = {}
        for task, folder in image_folders.items():
            target = tmp_path / f"{task}{len(found)}"
            datasets.load_from_disk(folder).map(how).save_to_disk(target)
            folders[task] = str(target)
        found.append(w(fitted(module_of(pool), images(folders))))
    assert all(torch.equal(other, found[0]) for other in found)


def test_other_data_modules_are_refused(pool):
    class Stranger(LightningDataModule):
        def train_dataloader(self):
            return []

    with pytest.raises(ConfigError, match="Calibration"):
        fitted(module_of(pool), Stranger())


def test_warm_start_goes_by_names(pool, image_folders, tmp_path):
    path = tmp_path / "coefficients.safetensors"
    first = fitted(module_of(pool, lr=3.0), images(image_folders))
    save_coefficients(first.coefficients(), path)
    again = module_of(pool, init_from=path)
    assert torch.equal(w(again), w(first))
    turned = {**pool, "experts": dict(reversed(pool["experts"].items()))}
    assert torch.equal(w(module_of(turned, init_from=str(path))), w(first).flip(0))
    assert not torch.equal(w(first)[0], w(first)[1])


def combined(pool, sums, **arguments):
    vectors = TaskVectors(**pool, transforms=[Combine(sums)])
    return descending(OpenClipClassifier(pool["base"]), vectors, LayerWise, Entropy(), **arguments)


def test_a_warm_start_follows_the_names_that_transforms_give(pool, tmp_path):
    path = tmp_path / "coefficients.safetensors"
    sums = {"shapes": {"shapes": 1, "colours": -1}, "both": {"shapes": 1, "colours": 1}}
    first = combined(pool, sums)
    with torch.no_grad():
        w(first).copy_(torch.tensor([[0.25], [0.75]]).expand_as(w(first)))
    save_coefficients(first.coefficients(), path)
    turned = combined(pool, dict(reversed(sums.items())), init_from=path)
    assert turned.merged.task_vectors.experts == ("both", "shapes")
    assert torch.equal(w(turned), w(first).flip(0))
    with pytest.raises(CoefficientsError, match="its experts are not this run's"):
        module_of(pool, init_from=path)


def test_a_warm_start_that_does_not_fit_is_refused(pool, image_folders, tmp_path):
    path = tmp_path / "coefficients.safetensors"
    save_coefficients(module_of(pool, LayerWise).coefficients(), path)
    with pytest.raises(CoefficientsError, match=r"coefficients\.safetensors"):
        module_of(pool, TaskWise, init_from=path)
    fewer = {**pool, "experts": {"colours": pool["experts"]["colours"]}}
    with pytest.raises(CoefficientsError, match="experts"):
        module_of(fewer, init_from=path)
    with pytest.raises(CoefficientsError, match="gone"):
        module_of(pool, init_from=tmp_path / "gone.safetensors")


def test_the_protocol_travels_with_the_coefficients(pool, image_folders):
    module = fitted(module_of(pool), images(image_folders, transductive=True))
    made = module.coefficients()
    assert made.step == 3 and made.protocol["transductive"] is True
    assert module_of(pool).coefficients().protocol == {}
