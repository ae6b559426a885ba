"""Bad input: every row is one fault, met by the right exit code, one complete error line, and nothing written."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import torch
import yaml
from conftest import CLASSES, TINY, build_open_clip_folder, noise_images
from running import LAYER_WISE, QUICK, TASK_ARITHMETIC, child, command, fit_words, pool_config, write_yaml
from safetensors.torch import load_file, save_file


class Place:
    """A pool in a temporary folder, to be damaged."""

    def __init__(self, folder: Path, pool, images) -> None:
        self.folder, self.config = folder, pool_config(pool, images)
        self.words: list[object] = []
        self.method: Path = LAYER_WISE
        self.vectors = self.config["model"]["task_vectors"]
        self.data = self.config["data"]["init_args"]
        self.canary = folder / "canary"

    def expert(self, task: str = "colours") -> Path:
        """A copy of an expert that may be damaged."""
        copy = self.folder / f"{task}_copy.safetensors"
        if not copy.exists():
            copy.write_bytes(Path(self.vectors["experts"][task]).read_bytes())
            self.vectors["experts"][task] = str(copy)
        return copy

    def tensors(self, change: Callable[[dict], object]) -> Path:
        """Rewrite the expert's tensors."""
        path = self.expert()
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)
        return path

    def dataset(self, splits: dict, task: str = "colours") -> Path:
        folder = self.folder / f"{task}_images"
        datasets.DatasetDict(splits).save_to_disk(folder)
        self.data["tasks"][task]["dataset"] = str(folder)
        return folder


class Canary:
    """Pickled, it would write a file on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "code ran")


PROJ = "visual.proj"


def truncated_expert(place):
    path = place.expert()
    path.write_bytes(path.read_bytes()[:-100])
    return [path.name, "truncated"]


def missing_key(place):
    place.tensors(lambda tensors: tensors.pop(PROJ))
    return ["colours", PROJ]


def wrong_shape(place):
    place.tensors(lambda tensors: tensors.update({PROJ: tensors[PROJ][:-1].clone()}))
    return ["colours", PROJ]


def nan_weight(place):
    path = place.tensors(lambda tensors: tensors[PROJ].view(-1)[7].fill_(torch.nan))
    return [path.name, PROJ, "NaN"]


def inf_weight(place):
    path = place.tensors(lambda tensors: tensors[PROJ].view(-1)[7].fill_(-torch.inf))
    return [path.name, PROJ, "Inf"]


def integer_weights(place):
    place.tensors(lambda tensors: tensors.update({PROJ: tensors[PROJ].to(torch.int8)}))
    return ["colours", PROJ, "int8"]


def pickled_module(place):
    path = place.folder / "expert.pt"
    with path.open("wb") as file:
        pickle.dump(Canary(place.canary), file)
    place.vectors["experts"]["colours"] = str(path)
    return [path.name, "pickle"]


def torch_saved_module(place):
    path = place.folder / "finetuned.pt"
    torch.save({"module": Canary(place.canary)}, path)
    place.vectors["experts"]["colours"] = str(path)
    return [path.name, "pickle"]


def lfs_pointer(place):
    path = place.expert()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    return [path.name, "git-LFS"]


def empty_file(place):
    path = place.expert()
    path.write_bytes(b"")
    return [path.name]


def zeroed_header(place):
    path = place.expert()
    path.write_bytes(bytes(64) + path.read_bytes()[64:])
    return [path.name]


def absent_expert(place):
    place.vectors["experts"]["colours"] = str(place.folder / "gone.safetensors")
    return ["gone.safetensors"]


def absent_base(place):
    place.vectors["base"] = str(place.folder / "no_base")
    return ["no_base"]


def same_expert_twice(place):
    place.vectors["experts"]["shapes"] = place.vectors["experts"]["colours"]
    return ["shapes", "colours"]


def copied_expert_twice(place):
    place.vectors["experts"]["shapes"] = str(place.expert())
    return ["shapes", "colours"]


def expert_is_base(place):
    place.vectors["experts"]["shapes"] = place.vectors["base"]
    return ["shapes", "base"]


def other_architecture(place):
    wide = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "width": 48}}
    folder = place.folder / "wide"
    build_open_clip_folder(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({**config, "model_cfg": wide}))
    place.config["model"]["backbone"]["init_args"]["architecture"] = str(folder)
    return ["base", "visual."]


def unknown_architecture(place):
    place.config["model"]["backbone"]["init_args"]["architecture"] = "ViT-Z-99"
    return ["ViT-Z-99"]


def nothing_included(place):
    place.vectors["include"] = ["language.*"]
    return ["include", "language.*"]


def empty_calibration(place):
    splits = {name: noise_images(CLASSES["colours"], 12, seed) for seed, name in enumerate(("validation", "test"))}
    place.dataset({**splits, "calibration": splits["test"].select([])})
    return ["colours", "calibration"]


def calibration_rounds_to_nothing(place):
    place.dataset({name: noise_images(CLASSES["colours"], 4, seed) for seed, name in enumerate(("train", "test"))})
    return ["colours", "calibration"]


def no_label_column(place):
    splits = {name: noise_images(CLASSES["colours"], 40, seed) for seed, name in enumerate(("train", "test"))}
    place.dataset({name: rows.remove_columns("label") for name, rows in splits.items()})
    return ["colours", "label"]


def no_image_column(place):
    splits = {name: noise_images(CLASSES["colours"], 40, seed) for seed, name in enumerate(("train", "test"))}
    place.dataset({name: rows.rename_column("image", "picture") for name, rows in splits.items()})
    return ["colours", "image"]


def no_split_at_all(place):
    place.dataset({"validation": noise_images(CLASSES["colours"], 40, 0)})
    return ["colours", "split is missing"]


def absent_dataset(place):
    place.data["tasks"]["colours"]["dataset"] = str(place.folder / "no_images")
    return ["colours", "no_images"]


def unreadable_image(place):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES["colours"])})
    rows = {"image": [{"bytes": b"not an image", "path": None}] * 40, "label": [0] * 40}
    broken = datasets.Dataset.from_dict(rows, features)
    place.dataset({"train": broken, "test": noise_images(CLASSES["colours"], 12, 1)})
    return ["colours", "row"]


def expert_without_data(place):
    del place.data["tasks"]["shapes"]
    return ["shapes", "no data"]


def no_experts(place):
    place.vectors["experts"] = {}
    return ["experts"]


def no_tasks(place):
    place.data["tasks"] = {}
    return ["tasks"]


def config_key(place):
    place.words = ["--model.learning_rate=0.1"]
    return ["learning_rate"]


def config_key_in_yaml(place):
    place.config["model"]["lrr"] = 0.1
    return ["lrr"]


def wrong_type(place):
    place.config["model"]["search"] = {"lr": "fast"}
    return ["model.search.lr"]


def unknown_class(place):
    place.config["model"]["objective"] = {"class_path": "adamerge.objectives.Entropie"}
    place.method = TASK_ARITHMETIC
    return ["Entropie"]


def class_of_the_wrong_kind(place):
    place.config["model"]["objective"] = {"class_path": "adamerge.constraints.Clamp"}
    place.method = TASK_ARITHMETIC
    return ["objective"]


def absent_config(place):
    place.method = place.folder / "nowhere.yaml"
    return ["nowhere.yaml"]


def empty_config(place):
    place.method = place.folder / "empty.yaml"
    place.method.write_text("")
    return ["empty.yaml"]


def torn_config(place):
    place.method = place.folder / "torn.yaml"
    place.method.write_text("model: {lr: [")
    return ["torn.yaml"]


def code_in_yaml(place):
    place.method = place.folder / "code.yaml"
    place.method.write_text(f"model:\n  lr: !!python/object/apply:os.system ['touch {place.canary}']\n")
    return ["code.yaml"]


def negative_lr(place):
    place.words = ["--model.search.lr=-0.1"]
    return ["model.search.lr", "-0.1"]


def lr_is_nan(place):
    place.words = ["--model.search.lr=.nan"]
    return ["model.search.lr", "nan"]


def no_micro_batch(place):
    place.words = ["--model.micro_batch=0"]
    return ["model.micro_batch", "0"]


def no_batch(place):
    place.words = ["--data.batch_size=0"]
    return ["batch_size", "0"]


def task_weight_of_nobody(place):
    place.config["model"]["task_weights"] = {"colors": 2.0}
    return ["task_weights", "colors"]


def no_max_steps(place):
    place.words = ["--trainer.max_steps=-1"]
    return ["max_steps"]


def coefficients_rounded(place):
    place.words = ["--trainer.precision=bf16-true"]
    return ["precision", "bf16-true"]


def underflow(place):
    place.words = ["--trainer.precision=16-mixed"]
    return ["precision", "16-mixed"]


def no_such_precision(place):
    place.words = ["--trainer.precision=12-true"]
    return ["precision"]


def labels_for_entropy(place):
    place.words = ["--data.labelled=true"]
    return ["Entropy", "label"]


def initial_outside(place):
    place.words = ["--model.parametrization.init_args.init=1.5"]
    return ["Projection", "1.5"]


def warm_start_from_nothing(place):
    place.words = [f"--model.init_from={place.folder / 'gone.safetensors'}"]
    return ["gone.safetensors"]


def warm_start_from_a_model(place):
    place.words = [f"--model.init_from={place.expert()}"]
    return ["colours_copy.safetensors"]


class Fault(NamedTuple):
    damage: Callable[[Place], list[str]]
    code: int


CONFIG, MODEL = 2, 3
FAULTS = [
    *(Fault(damage, MODEL) for damage in (
        truncated_expert, missing_key, wrong_shape, nan_weight, inf_weight, integer_weights, pickled_module,
        torch_saved_module, lfs_pointer, empty_file, zeroed_header, absent_expert, absent_base, same_expert_twice,
        copied_expert_twice, expert_is_base, other_architecture, empty_calibration, calibration_rounds_to_nothing,
        no_label_column, no_image_column, no_split_at_all, absent_dataset, unreadable_image, warm_start_from_nothing,
        warm_start_from_a_model,
    )),
    *(Fault(damage, CONFIG) for damage in (
        unknown_architecture, nothing_included, expert_without_data, no_experts, no_tasks, config_key,
        config_key_in_yaml, wrong_type, unknown_class, class_of_the_wrong_kind, absent_config, empty_config, torn_config,
        code_in_yaml, negative_lr, lr_is_nan, no_micro_batch, no_batch, task_weight_of_nobody, no_max_steps,
        coefficients_rounded, underflow, no_such_precision, labels_for_entropy, initial_outside,
    )),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.damage.__name__)
def test_fault(fault, pool, image_folders, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = Place(tmp_path, pool, image_folders)
    named = fault.damage(place)
    file = write_yaml(tmp_path / "pool.yaml", place.config)
    outcome = command(capfd, "fit", *fit_words(file, *place.words, method=place.method))
    assert outcome.code == fault.code, outcome.err[-3000:]
    assert not place.canary.exists(), "code from a file ran"
    assert not (tmp_path / "runs").exists(), "something was written"
    assert outcome.err.splitlines()[0] == outcome.error, "something stands before the error"
    said = outcome.error.replace(str(tmp_path), "")  # which has the fault's own name in it
    missing = [word for word in named if word not in said]
    assert not missing, f"{missing} not named in: {outcome.error}"
    assert "Traceback" not in outcome.err and len(outcome.error) < 1000


@pytest.mark.slow
def test_in_a_process_of_its_own_the_error_is_the_first_line_too(pool, image_folders, tmp_path):
    place = Place(tmp_path, pool, image_folders)
    truncated_expert(place)
    file = write_yaml(tmp_path / "pool.yaml", place.config)
    done = child(["-m", "adamerge", "fit", *fit_words(file)], tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: ") and "truncated" in done.stderr.splitlines()[0]


def test_a_wrong_key_suggests_the_right_one(pool, image_folders, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, pool, image_folders)
    place.config["model"]["micro_batches"] = 4
    file = write_yaml(tmp_path / "pool.yaml", place.config)
    outcome = command(capfd, "fit", *fit_words(file))
    assert outcome.code == 2 and "micro_batches" in outcome.error


def test_fast_dev_run_writes_nothing(pool, image_folders, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    file = write_yaml(tmp_path / "elsewhere" / "pool.yaml", pool_config(pool, image_folders))
    words = ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false", "--data.batch_size=4"]
    outcome = command(capfd, "fit", "--config", file, "--config", LAYER_WISE, *words)
    assert outcome.code == 0, outcome.err[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_fast_dev_run_of_a_method_without_objective(pool, image_folders, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    file = write_yaml(tmp_path / "elsewhere" / "pool.yaml", pool_config(pool, image_folders))
    words = ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]
    outcome = command(capfd, "fit", "--config", file, "--config", TASK_ARITHMETIC, *words)
    assert outcome.code == 0, outcome.err[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_yaml_is_never_more_than_data(tmp_path):
    """The canary of ``code_in_yaml`` is alive: the unsafe loader would run it."""
    canary = tmp_path / "canary"
    yaml.unsafe_load(f"!!python/object/apply:os.system ['touch {canary}']")
    assert canary.exists()


def test_the_pickle_canary_is_alive(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_quick_words_are_options():
    assert all(word.startswith("--") for word in QUICK)
