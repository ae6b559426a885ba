"""Pickles: each kind is told from its bytes alone, and what the error says to do with it gives the tensors."""

from __future__ import annotations

import os
import pickle
import re
import sys
import textwrap
import zipfile

import pytest
import safetensors.torch
import torch
from running import ROOT, child

from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError
from adamerge.io.pickles import described
from adamerge.io.safetensors_file import TensorFile

MODULE = """
    import torch

    class ImageEncoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)
"""
OLD = {"_use_new_zipfile_serialization": False}
STATE_DICTS = ["state dict", "state dict in the old format", "state dict in halves", "nested"]
CODE = ["protocol 5"]  # which torch reads only as it reads code
MODULES = ["module", "module in the old format", "module in protocol 5"]
BARE = ["bare state dict", "bare module"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Files by kind, of a module whose class can be imported from their folder alone; and its tensors."""
    folder = tmp_path_factory.mktemp("pickles")
    (folder / "their_modeling.py").write_text(textwrap.dedent(MODULE))
    sys.path.insert(0, str(folder))
    try:
        import their_modeling

        torch.manual_seed(0)
        network = their_modeling.ImageEncoder()
        tensors = {name: value.clone() for name, value in network.state_dict().items()}
        paths = {
            kind: folder / f"{kind.replace(' ', '_')}.pt" for kind in [*STATE_DICTS, *CODE, *MODULES, *BARE, "script"]
        }
        torch.save(network.state_dict(), paths["state dict"])
        torch.save(network.state_dict(), paths["state dict in the old format"], **OLD)
        torch.save({name: value.half() for name, value in tensors.items()}, paths["state dict in halves"])
        torch.save(network.state_dict(), paths["protocol 5"], pickle_protocol=5)
        torch.save({"state_dict": tensors, "epoch": 3, "model_name": "ViT-B-32"}, paths["nested"])
        torch.save(network, paths["module"])
        torch.save(network, paths["module in the old format"], **OLD)
        torch.save(network, paths["module in protocol 5"], pickle_protocol=5)
        paths["bare state dict"].write_bytes(pickle.dumps(tensors | {"model_name": "ViT-B-32"}))
        paths["bare module"].write_bytes(pickle.dumps(network))
        with pytest.warns(FutureWarning):
            torch.jit.script(torch.nn.Linear(2, 3)).save(paths["script"])
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("their_modeling", None)
    return paths, tensors


@pytest.mark.parametrize("kind", [*STATE_DICTS, *CODE, *MODULES, *BARE, "script"])
def test_the_kind_is_told_and_nothing_is_imported(saved, kind):
    path = saved[0][kind]
    what, todo = described(path)
    assert "their_modeling" not in sys.modules
    with pytest.raises(CheckpointError, match="is not a safetensors file: it is ") as found:
        TensorFile(path)
    assert what in found.value.what and found.value.todo == todo and path.name in todo
    if kind in STATE_DICTS:
        assert what == "a pickled state dict" and "weights_only=True" in todo and "trust" not in todo
    else:
        assert "weights_only=True" not in todo and "if you trust who wrote it" in todo
    if kind in {*MODULES, "bare module"}:
        assert "their_modeling.ImageEncoder" in what and "where these are installed" in todo
    if kind == "script":
        assert "TorchScript" in what


SCRIPT = """
    import pickle, re, sys
    import torch
    from safetensors.torch import save_file

    for advice in sys.argv[1:]:
        words = r"(tensors = .+?\\)),( of a module its \\.state_dict\\(\\))?.*(save_file.+)"
        load, module, save = re.search(words, advice).groups()
        exec(load)
        if module and not isinstance(tensors, dict):
            tensors = tensors.state_dict()
        if "state_dict" in tensors:
            tensors = tensors["state_dict"]
        exec(save.replace("model.safetensors", re.search(r"'(.+?)\\.pt'", load)[1] + ".safetensors"))
"""


def test_doing_what_is_said_gives_the_tensors(saved):
    """In one process of its own, in the files' folder, where the classes are."""
    paths, tensors = saved
    folder = paths["module"].parent
    run = child(["-c", textwrap.dedent(SCRIPT), *(described(path)[1] for path in paths.values())], folder)
    assert run.returncode == 0, run.stderr
    for kind, path in paths.items():
        found = safetensors.torch.load_file(path.with_suffix(".safetensors"))
        if kind == "script":
            assert found.keys() == {"weight", "bias"}
            continue
        assert found.keys() == tensors.keys(), kind
        assert all(torch.equal(value, tensors[name].to(value.dtype)) for name, value in found.items()), kind


def test_a_folder_of_pickles_and_an_adapter_have_the_same_advice(saved, tmp_path):
    for kind, words in (("module", "weights_only=False"), ("state dict", "weights_only=True")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "pytorch_model.bin").write_bytes(saved[0][kind].read_bytes())
        with pytest.raises(CheckpointError, match="only as pickle") as found:
            open_checkpoint(folder)
        assert words in found.value.todo and "look for a safetensors version" in found.value.todo


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil_was_here",)


@pytest.mark.parametrize("zipped", [False, True])
def test_hostile_and_broken_pickles_are_only_read(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(Evil()), pickle.dumps(Evil())[:-9], b"\x80\x02" + b"\xff" * 99, b"\x80\x04\x95"):
        path = tmp_path / "x.pt"
        path.write_bytes(content)
        if zipped:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("x/data.pkl", content)
        what, todo = described(path)
        assert "pickle" in what and "weights_only=True" not in todo
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]


@pytest.mark.parametrize("source", ["task_vectors", "tall_masks"])
def test_the_recipe_of_published_pickles_is_of_the_kind_that_it_names(source):
    """Whole modules need their classes and trust; state dicts neither."""
    pages = (ROOT / "docs" / "pools.md").read_text()
    kind = {"task_vectors": "modules", "tall_masks": "state dicts"}[source]
    anchor = f"pickled-{kind.replace(' ', '-')}-of-{source}"
    section = next(part for part in pages.split("\n### ") if part.lower().startswith(f"pickled {kind} of"))
    assert f"published as pickled {kind}" in section and f"#{anchor}" in pages
    for path in (ROOT / "configs" / "pools").glob(f"*_{source}.yaml"):
        assert anchor in path.read_text(), f"{path.name} leads to the recipe"
    if kind == "modules":
        assert re.search(r"torch\.load\([^)]*weights_only=False\)\.state_dict\(\)", section)
        assert "If you trust them" in section
    else:
        assert re.search(r"torch\.load\([^)]*weights_only=True\)\n?\s", section) and "weights_only=False" not in section
