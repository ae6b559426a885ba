"""Exported folders as strangers read them: every weights file at the top holds the network's tensors and nothing else."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import pytest
from pico import pico_pool
from running import child

from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.export import export
from adamerge.artifacts.model_card import COEFFICIENTS_FILE
from adamerge.backbones import OpenClipClassifier
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.io.coefficient_file import read_coefficients
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors

KINDS = ["bert", "llama", "qwen2_tied", "llava", "t5"]

SCRIPT = """
    import glob, json, sys, tempfile
    import open_clip, transformers
    from safetensors.torch import load_file

    def top_files(folder):
        # as loaders of the vLLM kind do: whatever matches is weights
        found = {}
        for path in sorted(glob.glob(f"{folder}/*.safetensors")):
            tensors = load_file(path)
            assert tensors and not tensors.keys() & found.keys(), path
            found |= tensors
        return found

    problems = []
    for folder, loader in json.loads(sys.argv[1]).items():
        found = top_files(folder)
        if loader == "open_clip":
            network = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
            network.load_state_dict(found, strict=True)
            continue
        network, information = getattr(transformers, loader).from_pretrained(folder, output_loading_info=True)
        bad = {key: list(value) for key, value in information.items() if value and key != "error_msgs"}
        with tempfile.TemporaryDirectory() as place:
            network.save_pretrained(place)  # under the names that the library itself writes
            own = top_files(place)
        strange = sorted(found.keys() - own.keys())
        shapes = [name for name in own if name in found and found[name].shape != own[name].shape]
        if bad or strange or shapes or own.keys() - found.keys():
            problems.append((folder, bad, strange, shapes, sorted(own.keys() - found.keys())))
    assert "adamerge" not in sys.modules
    assert not problems, problems
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pool):
    """Exported folder to the name of its loader; sharded, and of one task, too."""
    root = tmp_path_factory.mktemp("exported")
    vectors = TaskVectors(**pool)
    clip = Coefficients(vectors, LayerWise(vectors, init=0.3), OpenClipClassifier(pool["base"]).layout())
    found = {export(clip, root / "open_clip"): "open_clip"}
    for kind in KINDS:
        made = pico_pool(kind, root / "pools" / kind)
        vectors = TaskVectors(made["base"], made["experts"], include=made["include"], exclude=made["exclude"])
        coefficients = Coefficients(vectors, LayerWise(vectors, init=0.3), made["backbone"]().layout())
        found[export(coefficients, root / kind)] = made["loader"]
        if kind == "bert":
            found[export(coefficients, root / "bert_one", task="one")] = made["loader"]
        if kind == "llama":
            found[export(coefficients, root / "llama_sharded", shard_size=1e-5)] = made["loader"]
    return found


@pytest.mark.slow
def test_every_weights_file_at_the_top_loads_strictly(folders):
    """In one process of its own, with open_clip's and transformers' own loaders and with a plain loop over the files."""
    assert len(list((Path(next(f for f in folders if f.name == "llama_sharded"))).glob("*.safetensors"))) > 2
    named = json.dumps({str(folder): loader for folder, loader in folders.items()})
    run = child(["-c", textwrap.dedent(SCRIPT), named], Path(__file__).parent)
    assert run.returncode == 0, run.stderr[-3000:]


def test_what_is_beside_the_weights_lies_in_folders_of_its_own(folders):
    for folder in folders:
        assert (folder / COEFFICIENTS_FILE).is_file() and Path(COEFFICIENTS_FILE).parent != Path()
        tops = {path.name for path in folder.glob("*.safetensors")}
        expected = {"open_clip_model.safetensors"} if folder.name == "open_clip" else {"model.safetensors"}
        assert tops == expected or all(name.startswith("model-0") for name in tops), tops
    heads = next(folder for folder in folders if folder.name == "bert") / "heads"
    assert {path.relative_to(heads).as_posix() for path in heads.rglob("*.safetensors")} == {
        "one/model.safetensors", "two/model.safetensors"
    }  # fmt: skip


def test_folders_of_the_version_before_are_models_still(folders, tmp_path):
    """There the coefficients lay beside the weights, of one file and of several."""
    for name in ("llama", "llama_sharded", "open_clip"):
        folder = next(folder for folder in folders if folder.name == name)
        old = Path(shutil.copytree(folder, tmp_path / name))
        (old / COEFFICIENTS_FILE).rename(old / "adamerge_coefficients.safetensors")
        (old / COEFFICIENTS_FILE).parent.rmdir()
        assert open_checkpoint(old).fingerprint == open_checkpoint(folder).fingerprint
        assert read_coefficients(old / "adamerge_coefficients.safetensors")[0]["step"] == 0
