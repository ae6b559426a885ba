"""`adamerge check`: from headers and configurations alone, everything that is wrong, and what it would take."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CLASSES
from pico import pico_pool
from running import LAYER_WISE, METHODS, child, command, pool_config, write_yaml
from safetensors.torch import load_file, save_file

from adamerge.errors import CheckpointError, ConfigError
from adamerge.io.safetensors_file import TensorFile
from adamerge.runs.check import check
from adamerge.runs.configuration import configurations

STAGED = METHODS / "expert_merging_plusplus"
NOTHING_LEARNED = {
    METHODS / f"{name}.yaml"
    for name in (
        *("dare", "task_arithmetic", "ties", "ties_original", "weight_average"),
        *("auto_data_free", "iso_c", "iso_cts", "least_squares", "tsvm", "wudi", "wudi_descent"),
    )
}
WAIT = {METHODS / "adarank", METHODS / "wudi_strength"}
"""What they learn has a plan when the stage before has written its file."""


@pytest.fixture
def tiny(pool, image_folders, tmp_path):
    return write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))


def texts(tasks):
    """Tasks of a language model whose data nobody opens."""
    return {task: {"dataset": "org/name"} for task in tasks}


def checked(files, overrides):
    check(configurations([*map(str, files), *overrides], "check"))


def words(capsys):
    """What was printed, without line breaks."""
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", sorted(METHODS.iterdir()), ids=lambda path: path.stem)
def test_every_method_can_be_checked(tiny, method, capsys, monkeypatch):
    monkeypatch.setattr(TensorFile, "read", lambda self, name: pytest.fail(f"read {name}"))
    overrides = []
    if method.name == "atlas_negation.yaml":
        overrides = ["--model.task_vectors.transforms=[]"]
    checked([tiny, method], overrides)
    text = words(capsys)
    assert all(f"{task} " in text for task in CLASSES) and "fits" in text
    planned = method not in {*NOTHING_LEARNED, *WAIT}
    assert planned == ("Disk()" in text and ", chosen" in text) and planned != ("nothing is learned" in text)
    assert len(re.findall(r"stage \d of", text)) == (2 if method.is_dir() else 0)


def test_what_it_prints_is_what_a_fit_does(tiny, tmp_path, capfd, monkeypatch):
    from running import fit_words, without_pictures

    from adamerge.runs.fit import fit

    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    assert (
        command(capfd, "check", tiny, LAYER_WISE, "--model.storage=Resident", "--model.storage.dtype=float16").code == 0
    )
    run = fit(fit_words(tiny, "--id=a", "--model.storage=Resident", "--model.storage.dtype=float16", steps=1))
    told = capfd.readouterr().out
    plan = json.loads((run / "summary.json").read_text())["plan"]
    assert plan["storage"] == "Resident(float16)" and "Resident(float16)" in told
    checked([tiny, LAYER_WISE], ["--model.storage=Resident", "--model.storage.dtype=float16"])
    assert f"{plan['coefficients']} coefficients in {plan['groups']} groups" in " ".join(capfd.readouterr().out.split())


def test_all_problems_are_printed_and_the_exit_code_says_so(tiny, pool, tmp_path, capfd):
    weights = load_file(pool["experts"]["colours"])
    names = [name for name in weights if weights[name].dim() == 2][:2]
    for name in names:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "colours.safetensors")
    bad = [f"--model.task_vectors.experts.colours={tmp_path / 'colours.safetensors'}"]
    bad.append("--model.task_vectors.experts.gone=nowhere.safetensors")
    outcome = command(capfd, "check", tiny, LAYER_WISE, *bad)
    assert outcome.code == 2 and outcome.error == "error: expert 'gone' has no data", "as a fit says first"
    assert "all 4 problems are listed above" in outcome.err
    assert outcome.out.count("has another shape than in the base") == 2 and all(name in outcome.out for name in names)
    assert "nowhere.safetensors" in outcome.out and "expert 'gone' has no data" in outcome.out
    assert "1 experts" in outcome.out  # what is left is planned all the same


def test_files_beside_the_weights_that_differ_are_noted_and_are_no_problem(tmp_path, capfd):
    pool = pico_pool("llama", tmp_path / "pool")
    path = Path(pool["experts"]["one"]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    backbone = {"class_path": "adamerge.CausalLM", "init_args": {"model": pool["base"]}}
    vectors = {"base": pool["base"], "experts": pool["experts"]}
    data = {"class_path": "adamerge.LanguageCalibration", "init_args": {"tasks": texts(pool["experts"])}}
    file = write_yaml(tmp_path / "pool.yaml", {"model": {"backbone": backbone, "task_vectors": vectors}, "data": data})
    outcome = command(capfd, "check", file, STAGED)
    assert outcome.code == 0 and outcome.out.count("note: ") == 1
    assert "note: expert 'one': config.json: rms_norm_eps is '0.5', in the base" in outcome.out


def test_problems_are_told_once_for_all_stages(tiny, capfd):
    outcome = command(capfd, "check", tiny, STAGED, "--model.task_vectors.experts.gone=nowhere.safetensors")
    assert outcome.code == 2 and outcome.out.count("nowhere.safetensors") == 1 and "stage 2 of 2" in outcome.out
    outcome = command(capfd, "check", tiny, STAGED, "--model.task_vectors.experts.colours=nowhere.safetensors")
    assert outcome.code == 3 and outcome.error.endswith(
        "expert 'colours': 'nowhere.safetensors': no such file or folder"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.parametrization.init_args.inti=3"], "model.parametrization.inti is no argument of LayerWise"),
        (["--model.parametrization=Nothing"], "model.parametrization: there is no parametrization 'Nothing'"),
        (["--model.storage=Resident", "--model.storage.dtype=int8"], "no dtype 'int8'"),
        (
            ["--model.task_vectors.transforms=[{class_path: Scale, init_args: {factors: {nobody: 1}}}]"],
            "no expert 'nobody'",
        ),
        (["--model.task_vectors.include=[nothing.*]"], "leave no tensor"),
        (["--tasks=[nobody]"], "the pool has no 'nobody'"),
        (["--model.storage", "Resident", "--model.storage.dtype", "int8"], "no dtype 'int8'"),
        (["--model.search.lr"], "--model.search.lr has no value"),
        (["--2.model.search.lr=1"], "there is no stage 2"),
        (["--model.parametrization=null"], "model.parametrization is in none of"),
        (["--trainer.precision=16-mixed"], "trainer.precision=16-mixed does not suit"),
        (["--model.backbone.dtype=float16"], "gradients would underflow"),
        (["--trainer.max_steps=null"], "trainer.max_steps is not set"),
        (["--trainer.accumulate_grad_batches=4"], "use --model.micro_batch"),
        (["--trainer.max_steps=1e3"], "trainer.max_steps: '1e3' is no whole number"),
        (["--trainer.devices=abc"], "trainer.devices is no whole number"),
        (["--trainer.num_nodes=many"], "trainer.num_nodes: 'many' is no whole number"),
        (["--model.task_vectors.base=null"], "model.task_vectors.base is missing"),
        (["--model.task_vectors.experts={colours: null}"], "model.task_vectors.experts.colours is missing"),
    ],
)
def test_what_the_configuration_has_wrong(tiny, capfd, arguments, message):
    outcome = command(capfd, "check", tiny, LAYER_WISE, *arguments)
    assert outcome.code == 2 and message in outcome.error + outcome.out


@pytest.mark.parametrize(("devices", "count"), [("2", 2), ("[0,1,2]", 3), ("auto", 1), ("-1", 1)])
def test_the_copy_and_the_processes_are_those_of_the_fit(tiny, capsys, devices, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words_ = ["--model.copy=ShardedCopy", f"--trainer.devices={devices}", "--trainer.num_nodes=2"]
    checked([tiny, LAYER_WISE], words_)
    text = words(capsys)
    assert f"of the ShardedCopy what is always there in each of {2 * count} processes" in text
    assert "Disk()" in text and "Resident" not in text
    checked([tiny, LAYER_WISE], ["--model.copy=BlockCopy"])
    text = words(capsys)
    assert "of the BlockCopy what is always there" in text and "Resident(float32)" in text


def test_a_storage_that_does_not_go_with_the_copy(tiny, capfd):
    outcome = command(capfd, "check", tiny, LAYER_WISE, "--model.copy=ShardedCopy", "--model.storage=Resident")
    assert outcome.code == 2 and "holds whole tensors in each process" in outcome.error


def test_a_pool_alone_is_no_method(tiny):
    with pytest.raises(ConfigError, match="model.parametrization is in none"):
        checked([tiny, tiny], [])
    with pytest.raises(ConfigError, match="at most one folder"):
        checked([tiny, STAGED, STAGED], [])


def test_too_little_memory_is_a_warning(tiny, capsys, monkeypatch):
    from adamerge.task_vectors.memory import Available

    monkeypatch.setattr(Available, "on", classmethod(lambda cls, device, processes=None: cls(1000, 0)))
    checked([tiny, LAYER_WISE], [])
    assert "warning: not even the merged copy and its gradient fit" in words(capsys)


@pytest.mark.parametrize(("accelerator", "warned"), [("gpu", True), ("cuda", True), ("cpu", False), ("auto", False)])
def test_a_gpu_that_is_not_here_is_a_warning(tiny, capsys, monkeypatch, accelerator, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checked([tiny, LAYER_WISE], [f"--trainer.accelerator={accelerator}"])
    text = words(capsys)
    assert ("there is none here: this is the plan of the CPU" in text) == warned
    assert "whether the objective goes with them" in text[-200:]


def test_overrides_of_one_stage(tiny, capsys):
    checked([tiny, STAGED], ["--2.model.storage=LowBit", "--1.model.storage=Disk"])
    first, second = words(capsys).split("stage 2 of 2")
    assert "LowBit(8)" in second and second.index("LowBit(8)") < second.index(", chosen")
    assert "Disk()" in first.split(", chosen")[0].rpartition("yes")[0][-60:]


# a model of 7B, which nobody has -------------------------------------------------------------------------------------


def sparse(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16 whose values take no room."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def mistral() -> dict[str, tuple[int, ...]]:
    """Names and shapes of Mistral-7B: 7.24e9 elements."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096)}
    for i in range(32):
        layer = f"model.layers.{i}"
        for name, rows in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (rows, 4096)
        found |= {f"{layer}.mlp.{name}_proj.weight": (14336, 4096) for name in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (4096, 14336)
        found |= {f"{layer}.{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (4096,)}


CHILD = """
import sys, time
start = time.monotonic()
from adamerge.cli import main
code = main(sys.argv[1:])
[peak] = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("RESULT", code, time.monotonic() - start, peak)
print("LOADED", [name for name in ("lightning", "transformers", "open_clip", "datasets") if name in sys.modules])
"""


@pytest.mark.parametrize(
    "method", ["adamerging_layer_wise.yaml", pytest.param("concrete_adamerging_layer_wise", marks=pytest.mark.slow)]
)
def test_a_model_of_7b_is_checked_in_seconds_and_little_memory(tmp_path, method):
    tensors = mistral()
    for name in ("base", "math", "chat", "code"):
        sparse(tmp_path / f"{name}.safetensors", tensors)
    experts = {name: str(tmp_path / f"{name}.safetensors") for name in ("math", "chat", "code")}
    vectors = {
        "base": str(tmp_path / "base.safetensors"),
        "experts": experts,
        "include": ["model.layers.*_proj.weight"],
    }
    backbone = {"class_path": "adamerge.CausalLM", "init_args": {"model": vectors["base"]}}
    data = {"class_path": "adamerge.LanguageCalibration", "init_args": {"tasks": texts(vectors["experts"])}}
    pool = write_yaml(tmp_path / "pool.yaml", {"model": {"backbone": backbone, "task_vectors": vectors}, "data": data})
    done = child(["-c", textwrap.dedent(CHILD), "check", pool, METHODS / method], tmp_path)
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("RES", "LOAD"))}
    code, seconds, peak = lines["RESULT"]
    print(done.stdout)
    assert code == "0", done.stdout + done.stderr
    assert float(seconds) < 60 and int(peak) < 1.5e9  # most of either is torch
    assert lines["LOADED"] == ["[]"]
    text = " ".join(done.stdout.split())
    merged = sum(torch.Size(shape).numel() for name, shape in tensors.items() if name.endswith("_proj.weight"))
    assert f"224 tensors of {merged:,} elements, 672 coefficients in 224 groups" in text
    if method.startswith("concrete"):
        assert f"a mask of {merged:,} logits" in text
    whole = 4 * sum(torch.Size(shape).numel() for shape in tensors.values()) / 2**30
    assert f"merged copy {whole:.2f} GiB" in text


def test_a_model_of_7b_that_does_not_fit_its_base(tmp_path, capfd):
    tensors = mistral()
    sparse(tmp_path / "base.safetensors", tensors)
    sparse(tmp_path / "wide.safetensors", {name: (*shape[:-1], 5120) for name, shape in tensors.items()})
    vectors = {"base": str(tmp_path / "base.safetensors"), "experts": {"wide": str(tmp_path / "wide.safetensors")}}
    backbone = {"class_path": "adamerge.CausalLM", "init_args": {"model": vectors["base"]}}
    data = {"class_path": "adamerge.LanguageCalibration", "init_args": {"tasks": texts(vectors["experts"])}}
    pool = write_yaml(tmp_path / "pool.yaml", {"model": {"backbone": backbone, "task_vectors": vectors}, "data": data})
    start = time.monotonic()
    outcome = command(capfd, "check", pool, LAYER_WISE)
    assert time.monotonic() - start < 60 and outcome.code == 3
    assert outcome.out.count("has another shape") == len(tensors)


def test_no_library_of_training_is_loaded(tiny, tmp_path):
    done = child(["-c", textwrap.dedent(CHILD), "check", tiny, STAGED], tmp_path)
    # rows of data that are at hand are counted, by their own library
    assert "LOADED ['datasets']" in done.stdout, done.stdout + done.stderr
    assert sys.version_info >= (3, 11) and issubclass(CheckpointError, Exception)


def test_the_inputs_to_calibrate_on_are_counted_where_the_data_are_at_hand(tiny, tmp_path, capsys):
    checked([tiny, LAYER_WISE], ["--data.train_samples=10"])
    text = words(capsys)
    assert all(
        f"{task}: calibration 6 (drawn from 60 rows of train, seed 0; and 10 of train)" in text for task in CLASSES
    )
    checked([tiny, METHODS / "ties.yaml"], [])
    assert "calibration 6" not in words(capsys), "it opens no data"
    content = yaml.safe_load(tiny.read_text())
    first = next(iter(CLASSES))
    content["data"]["init_args"]["tasks"][first]["dataset"] = "org/name"
    content["data"]["init_args"]["tasks"][first]["classnames"] = CLASSES[first]
    checked([write_yaml(tmp_path / "hub.yaml", content), LAYER_WISE], [])
    assert f"{first}: calibration inputs are counted when a fit opens the data" in words(capsys)
