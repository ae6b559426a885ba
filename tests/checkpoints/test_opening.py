"""Sources: files, folders, shards, hub ids and memory hold the same model; hostile indexes are refused by name."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file
from tensor_files import SHARDS, many_dtypes, refusal, save_index, save_sharded

from adamerge.checkpoints.checkpoint import Checkpoint, StateDict
from adamerge.checkpoints.lora import CONFIG, WEIGHTS, AdapterCheckpoint
from adamerge.checkpoints.opening import is_hub_id, lasting_path, open_checkpoint
from adamerge.errors import CheckpointError
from adamerge.io.safetensors_file import TensorFile


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Return a small model of many dtypes."""
    return many_dtypes()


def test_all_sources_agree(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """File, folders, shards, a home-relative path and memory hold the same tensors and the same fingerprint."""
    names = save_sharded(tmp_path / "sharded", tensors)
    save_file(tensors, tmp_path / "one.safetensors", metadata={"note": "other metadata"})
    for name in ("model", "open_clip_model", "only"):
        (tmp_path / name).mkdir()
        save_file(dict(reversed(tensors.items())), tmp_path / name / f"{name}.safetensors")
    sources = [tmp_path / name for name in ("one.safetensors", "sharded", "model", "open_clip_model", "only")]
    checkpoints = [open_checkpoint(source) for source in [*sources, str(sources[0]), tensors]]
    for checkpoint in checkpoints:
        assert isinstance(checkpoint, Checkpoint) and list(checkpoint) == sorted(tensors) and len(checkpoint) == 9
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True
            assert checkpoint.shape(name) == tensor.shape and checkpoint.dtype(name) == tensor.dtype
        checkpoint.check()
    assert len({checkpoint.fingerprint for checkpoint in checkpoints}) == 1
    assert checkpoints[1].sources == tuple(tmp_path / "sharded" / shard for shard in sorted(set(names.values())))
    assert checkpoints[-1].sources == () and open_checkpoint(checkpoints[0]) is checkpoints[0]
    assert checkpoints[0] != checkpoints[1] and len(set(checkpoints)) == len(checkpoints)


HOSTILE = ["../a.safetensors", "/etc/a.safetensors", "a/b.safetensors", "./a.safetensors", "..\\a.safetensors", ".."]
HOSTILE += ["C:a.safetensors", "C:\\a.safetensors", "\\\\host\\a.safetensors", "a.safetensors/", "a.safetensors\0", ""]
HOSTILE += ["a\0.safetensors", "a.bin", "a.safetensors/..", ".safetensors", "a\n.safetensors", "\ud800.safetensors"]
HOSTILE += ["n" * 300 + ".safetensors", "a.safetensors:stream", 7, None, ["a.safetensors"], {}, "."]


@pytest.mark.parametrize("shard", HOSTILE)
def test_hostile_shard_names(tmp_path: Path, tensors: dict[str, torch.Tensor], shard: object) -> None:
    """Only plain names are followed, even where the file named exists."""
    names = save_sharded(tmp_path / "model", tensors)
    save_file({"bias": tensors["bias"]}, tmp_path / "a.safetensors")
    save_index(tmp_path / "model", names | {"bias": shard})
    assert "index.json' names what is no shard" in refusal(tmp_path / "model")


@settings(max_examples=60, deadline=None)
@given(shard=some.text(some.sampled_from("./\\a:\0~ \ne"), max_size=12))
def test_shard_names_stay_in_the_folder(tmp_path_factory: pytest.TempPathFactory, shard: str) -> None:
    """Whatever an index says, nothing but a missing or refused shard comes of it."""
    folder = tmp_path_factory.getbasetemp() / "named"
    folder.mkdir(exist_ok=True)
    save_index(folder, {"a": shard + ".safetensors"})
    assert "index.json' names" in refusal(folder)


def test_links_of_the_hub_cache_pass(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A snapshot's shards are links to blobs outside the folder, named by hash."""
    save_sharded(tmp_path / "plain", tensors)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "blobs").mkdir()
    for number, path in enumerate((tmp_path / "plain").iterdir()):
        blob = tmp_path / "models--org--name" / "blobs" / str(number)
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert open_checkpoint(snapshot).fingerprint == StateDict(tensors).fingerprint


def test_index_and_shards_must_agree(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Absent, hidden, moved and twice-held tensors, missing and unlisted shards: each is told with names."""
    folder = tmp_path / "model"
    names = save_sharded(folder, tensors)
    but_bias = {name: names[name] for name in names if name != "bias"}
    [other_shard] = {*SHARDS} - {names["bias"]}
    one_shard = {name: names[name] for name in names if names[name] == names["bias"]}
    cases = [
        (names | {"ghost": SHARDS[0]}, "listed but absent: 'ghost'; present but not listed there: none"),
        (but_bias, "absent: none; present but not listed there: 'bias'"),
        (but_bias | {"bias": other_shard}, "absent: 'bias'; present but not listed there: 'bias'"),
        (one_shard, "absent: none; present but not listed there: 'flag', 'none', 'w.torch.float16'"),
        (names | {"ghost": "gone.safetensors"}, "names 1 of 3 shards that do not exist: 'gone.safetensors'"),
        ([], "no 'weight_map'"),
        ({}, "no 'weight_map'"),
    ]
    for changed, message in cases:
        save_index(folder, changed)
        assert message in refusal(folder)
    index = folder / "model.safetensors.index.json"
    for content in (b"", b"[]", b"[" * 10_000, b'{"weight_map":{"a":"b","a":"c"}}', b" " * 10_000_001):
        index.write_bytes(content)
        assert str(index) in refusal(folder)
    index.rename(folder / "a.safetensors.index.json")
    save_index(folder, names)
    open_checkpoint(folder)  # the usual name goes first
    index.rename(folder / "b.safetensors.index.json")
    assert "several indexes" in refusal(folder)
    with pytest.raises(CheckpointError, match="holds tensors twice: 'a'"):
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
        type(open_checkpoint(tmp_path / "a.safetensors"))("both", [TensorFile(tmp_path / "a.safetensors")] * 2)


def test_each_shard_cut_short(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A damaged or missing shard is named."""
    save_sharded(tmp_path / "model", tensors)
    for shard in SHARDS:
        path = tmp_path / "model" / shard
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert str(path) in refusal(tmp_path / "model")
        path.unlink()
        assert shard in refusal(tmp_path / "model")
        path.write_bytes(whole)


def test_folders_without_weights(tmp_path: Path) -> None:
    """Pickles are refused with the reason and are not run; empty and ambiguous folders say what they hold."""
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return os.mkdir, (str(canary),)

    for name in ("pytorch_model.bin", "open_clip_pytorch_model.bin", "finetuned.pt"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        assert "has no .safetensors file" in refusal(folder)
        (folder / name).write_bytes(pickle.dumps(Evil()))
        assert f"only as pickle, which may run code when opened: '{name}'" in refusal(folder)
        assert "pickle" in refusal(folder / name)
    assert not canary.exists()
    for name in ("a", "b"):
        save_file({"a": torch.ones(1)}, folder / f"{name}.safetensors")
    assert "several safetensors files and no index: 'a.safetensors', 'b.safetensors'" in refusal(folder)
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensors" in refusal(tmp_path / "empty.safetensors")


@pytest.mark.parametrize("source", ["./a/b", "/a/b", "~/a/b", "gpt2", "", "a/b/c", "a/b.pt", "a\0b", Path("a/b")])
def test_missing_paths(source: str | Path) -> None:
    """What cannot be a hub id is a path, and says that there is no such thing."""
    assert "no such file or folder" in refusal(source)


def test_a_path_below_a_folder_that_exists_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    for source in ("checkpoints/llama-1b", "checkpoints/llama-1b@main"):
        assert "no such file or folder" in refusal(source)
    assert is_hub_id("org/llama-1b") and not is_hub_id("package:org/llama-1b")


def test_a_folder_inside_an_installed_package() -> None:
    """It is found without importing the package, and keeps its name: another machine has it elsewhere."""
    source = "package:adamerge/testbed/checkpoints/images/base"
    checkpoint = open_checkpoint(source)
    assert checkpoint.location == source and "visual.proj" in checkpoint
    assert "package 'no_such_package' is not installed" in refusal("package:no_such_package/model")
    assert "no such file or folder" in refusal("package:adamerge/nowhere")


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]) -> None:
    """An id goes to the hub with its revision and without pickles; the hub's failures name the id and the ways out."""
    save_sharded(tmp_path / "snapshot", tensors)
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        if "gone" in name:
            raise ConnectionError("no route\nto the hub")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = open_checkpoint("org/some-model.v2@refs/pr/1")
    assert checkpoint.location == "org/some-model.v2@refs/pr/1" and len(checkpoint) == len(tensors)
    assert "'org/gone' is no local file or folder" in refusal("org/gone") and "no route" in refusal("org/gone")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        open_checkpoint("org/gone")
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    assert asked[0] == ("org/some-model.v2", "refs/pr/1", wanted) and asked[1][1] is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "gone").mkdir(parents=True)
    assert "has no .safetensors file" in refusal("org/gone")  # what is there goes before the hub


# adapters -------------------------------------------------------------------------------------------------------------


def test_a_folder_with_an_adapters_configuration_is_an_adapter_of_the_base(lora) -> None:
    """Alone it is refused: its tensors are no model's."""
    base = open_checkpoint(lora.bases["llama"])
    adapter = open_checkpoint(str(lora.adapters["llama"]), base)
    assert isinstance(adapter, AdapterCheckpoint) and adapter.location == str(lora.adapters["llama"])
    assert adapter.sources == (lora.adapters["llama"] / WEIGHTS, lora.adapters["llama"] / CONFIG)
    assert "is a LoRA adapter and no model" in refusal(lora.adapters["llama"])


def test_base_plus_adapter_says_whose_it_is(lora, tmp_path: Path) -> None:
    """The base is compared by its weights, not by its path; another one is refused."""
    base = open_checkpoint(lora.bases["llama"])
    shutil.copytree(lora.bases["llama"], tmp_path / "copy")
    other = {name: value + 0.001 for name, value in load_file(lora.bases["llama"] / "model.safetensors").items()}
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / "model.safetensors")
    for model in (lora.bases["llama"], tmp_path / "copy"):
        found = open_checkpoint(f"{model}+{lora.adapters['llama']}", base)
        assert found.fingerprint == open_checkpoint(lora.adapters["llama"], base).fingerprint
        assert open_checkpoint(f"{model}+{lora.adapters['llama']}").keys() == base.keys()
    with pytest.raises(CheckpointError, match=r"is an adapter of '.*other', which is not this base"):
        open_checkpoint(f"{tmp_path / 'other'}+{lora.adapters['llama']}", base)
    with pytest.raises(CheckpointError, match=r"after the '\+', is no LoRA adapter"):
        open_checkpoint(f"{lora.bases['llama']}+{lora.bases['llama']}", base)
    assert "no such file or folder" in refusal(f"{lora.bases['llama']}+{tmp_path / 'gone'}")
    assert "no such file or folder" in refusal("a+b+c")


def test_a_path_with_a_plus_is_a_path(lora, tmp_path: Path) -> None:
    """What is there goes before any notation."""
    shutil.copytree(lora.adapters["llama"], tmp_path / "a+b")
    assert isinstance(open_checkpoint(tmp_path / "a+b", open_checkpoint(lora.bases["llama"])), AdapterCheckpoint)
    shutil.copytree(lora.bases["llama"], tmp_path / "c+d")
    assert "+" in open_checkpoint(str(tmp_path / "c+d")).location


def test_of_several_files_that_is_opened_which_the_folders_library_opens(tmp_path):
    """transformers takes the one file before an index that an older save left; open_clip takes its own."""
    one, other = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
    folder = tmp_path / "model"
    save_sharded(folder, {**other, "b": torch.zeros(1)})
    save_file(one, folder / "model.safetensors")
    assert torch.equal(open_checkpoint(folder)["a"], one["a"])
    save_file(other, folder / "open_clip_model.safetensors")
    assert torch.equal(open_checkpoint(folder)["a"], one["a"])
    (folder / "open_clip_config.json").write_text("{}")
    assert torch.equal(open_checkpoint(folder)["a"], other["a"])


def test_paths_are_written_from_wherever_one_stands(tmp_path, monkeypatch):
    for name in ("h3/base", "h3/adapter", "here", "far/deep"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    base, adapter = str(tmp_path / "h3" / "base"), str(tmp_path / "h3" / "adapter")
    assert lasting_path("../h3/base") == base
    assert lasting_path("../h3/base+../h3/./adapter") == f"{base}+{adapter}"
    assert lasting_path("org/model@main") == "org/model@main"
    assert lasting_path("org/model+../h3/adapter") == f"org/model+{adapter}"
    assert lasting_path("../gone") == "../gone"
    # a step back from behind a link is not one to where the link lies
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far" / "deep")
    (tmp_path / "far" / "model").mkdir()
    assert lasting_path("link/../model") == str((tmp_path / "far" / "model").resolve())
    assert lasting_path("link") == str(tmp_path / "here" / "link")
