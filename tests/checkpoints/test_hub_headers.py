"""Remote headers: names, shapes and dtypes of a model that is not here, as the Hub's client gives them."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from safetensors.torch import save_file
from task_vectors.test_memory import with_adapter

from adamerge.checkpoints.hub_headers import RemoteCheckpoint, open_headers
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows two models, and gives no file."""
    told = SimpleNamespace(asked=[], cached={})
    tensors = {"a.weight": TensorInfo("BF16", [6, 4], (0, 48)), "a.bias": TensorInfo("F32", [4], (48, 64))}
    split = {f"{i}.safetensors": SafetensorsFileMetadata({}, {n: t}) for i, (n, t) in enumerate(tensors.items())}

    def metadata(name, revision=None):
        told.asked.append((name, revision))
        if name == "org/nothing":
            raise OSError("Name or service not known\nmore")
        if name == "org/adapter":
            raise NotASafetensorsRepoError("no model")
        return SimpleNamespace(files_metadata=split)

    def snapshot(name, revision=None, **arguments):
        if arguments.get("local_files_only") and name not in told.cached:
            raise OSError("not cached")
        if not arguments.get("local_files_only") and name != "org/adapter":
            raise AssertionError("a model would be downloaded")
        return told.cached.get(name)

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return told


def test_headers_are_asked_for_and_no_file(hub):
    found = open_headers("org/model@v2")
    assert hub.asked == [("org/model", "v2")] and list(found) == ["a.bias", "a.weight"]
    assert found.shape("a.weight") == (6, 4) and found.dtype("a.weight") == torch.bfloat16
    assert found.dtype("a.bias") == torch.float32 and found.location == "org/model@v2"
    vectors = TaskVectors(found, {"one": open_headers("org/other", found)})
    assert set(vectors) == {"a.bias", "a.weight"}
    assert vectors.unlearned("a.weight").elements(len(vectors.experts)) == (24, 0)
    with pytest.raises(CheckpointError, match="is not on this machine"):
        found["a.bias"]
    with pytest.raises(CheckpointError, match="is not on this machine"):
        found.scan()


def test_what_is_here_is_opened_as_ever(hub, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(open_headers(tmp_path)["w"], torch.ones(2))
    hub.cached["org/model"] = str(tmp_path)
    assert torch.equal(open_headers("org/model")["w"], torch.ones(2)) and not hub.asked
    with pytest.raises(CheckpointError, match="no such file"):
        open_headers(tmp_path / "nothing")


def test_an_adapter_is_small_and_is_downloaded(hub, tmp_path):
    save_file({"a.weight": torch.randn(6, 4)}, tmp_path / "base.safetensors")
    base = open_checkpoint(tmp_path / "base.safetensors")
    hub.cached["org/adapter"] = str(with_adapter(tmp_path))
    for source in ("org/adapter", "org/base+org/adapter"):
        assert open_headers(source, base).factors("a.weight").rank == 2


def test_a_hub_that_does_not_answer_is_said(hub):
    with pytest.raises(
        CheckpointError, match="'org/nothing' is not on this machine.*Name or service not known"
    ) as found:
        open_headers("org/nothing")
    assert found.value.what.endswith("not known")


def test_dtypes_that_torch_lacks():
    found = RemoteCheckpoint("org/q", {"w": ("F6_E2M3", (2, 2)), "v": ("STRANGE", (1,))})
    for name in ("w", "v"):
        with pytest.raises(CheckpointError, match="which torch lacks"):
            found.dtype(name)
