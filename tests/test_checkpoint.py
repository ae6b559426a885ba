"""Checkpoints from every kind of source: the same weights give the same fingerprint, and damage is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import save_file

from adamerge.checkpoint import MERGEABLE, Checkpoint, StateDict, open_checkpoint
from adamerge.errors import CheckpointError
from adamerge.files import BITS, TensorFile

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(autouse=True)
def scans(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache of every test to itself, and return its folder of scans."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "adamerge" / "scans"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Return a small model of many dtypes; names are not sorted."""
    torch.manual_seed(0)
    floats = {f"w.{dtype}": torch.randn(3, 4).to(dtype) for dtype in sorted(MERGEABLE, key=str)}
    others = {"steps": torch.arange(5), "flag": torch.tensor(True), "codes": torch.randn(4).to(torch.float8_e4m3fn)}
    return floats | others | {"none": torch.zeros(0, 3), "bias": torch.randn(2)}


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write a folder of two shards with an index, and return its weight map."""
    folder.mkdir(parents=True)
    names = {name: SHARDS[place % 2] for place, name in enumerate(tensors)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if names[name] == shard}, folder / shard)
    save_index(folder, names)
    return names


def save_index(folder: Path, names: object) -> None:
    """Write the index of a sharded folder."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def aged(path: Path) -> Path:
    """Make a file look written a minute ago, as files usually are."""
    before = path.stat().st_mtime_ns - 60 * 10**9
    os.utime(path, ns=(before, before))
    return path


def refusal(source: object) -> str:
    """Open a source that must be refused, and return the first line of the message."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    return str(caught.value).splitlines()[0]


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


def test_the_fingerprint_by_hand() -> None:
    """Two hashed tensors, sorted by hash, hashed once more."""
    one = hashlib.sha256(b'["a", "F32", [1]]\n' + bytes([0, 0, 128, 63])).digest()
    two = hashlib.sha256(b'["b", "BF16", []]\n' + bytes([128, 63])).digest()
    expected = hashlib.sha256(b"".join(sorted([one, two]))).hexdigest()
    assert StateDict({"b": torch.tensor(1.0, dtype=torch.bfloat16), "a": torch.ones(1)}).fingerprint == expected


def test_every_bit_and_name_counts(tensors: dict[str, torch.Tensor]) -> None:
    """One changed bit, name, shape or dtype of the same bytes gives another fingerprint."""
    seen = {StateDict(tensors).fingerprint}
    flat = tensors["w.torch.float16"].view(torch.uint8).view(-1)
    for byte in range(0, len(flat), 5):
        flat[byte] ^= 1 << byte % 8
        seen.add(StateDict(tensors).fingerprint)
    bias = tensors.pop("bias")
    for changed in ({"bios": bias}, {"bias": bias[None]}, {"bias": bias.view(torch.int32)}, {}):
        seen.add(StateDict(tensors | changed).fingerprint)
    assert len(seen) == 1 + 5 + 4


@pytest.mark.parametrize("dtype", sorted(MERGEABLE, key=str))
def test_nonfinite_values_are_counted(tmp_path: Path, scans: Path, dtype: torch.dtype) -> None:
    """NaN, and infinities whose sum would be hidden, are found wherever they are; the largest number is not one."""
    tensors = {name: torch.full((5_000,), torch.finfo(dtype).max, dtype=dtype) for name in ("fine", "pair", "nan")}
    tensors["pair"][17], tensors["pair"][4_999] = torch.inf, -torch.inf
    tensors["nan"][0] = torch.nan
    save_file(tensors, tmp_path / "bad.safetensors")
    aged(tmp_path / "bad.safetensors")
    for _ in range(2):  # a bad result must not come back as a good one
        for source in (tmp_path / "bad.safetensors", tensors):
            checkpoint = open_checkpoint(source)
            assert checkpoint.scan().nonfinite == {"nan": 1, "pair": 2}
            with pytest.raises(CheckpointError) as caught:
                checkpoint.check()
            message = f"{checkpoint.location!r} has NaN or Inf in 2 of 3 tensors: 'nan' (1), 'pair' (2)"
            assert str(caught.value).splitlines()[0] == message
    assert not scans.exists()


def test_a_second_run_does_not_read_again(tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good scan is kept by file identity; a damaged or foreign entry is computed again, and a changed file too."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    fingerprint = open_checkpoint(path).fingerprint
    assert not scans.exists()  # too young: it could change and keep its mtime
    reads = []
    real = TensorFile.chunks
    monkeypatch.setattr(TensorFile, "chunks", lambda self, name: reads.append(name) or real(self, name))
    aged(path)
    assert [open_checkpoint(path).fingerprint for _ in range(3)] == [fingerprint] * 3 and len(reads) == 1
    [entry] = scans.iterdir()
    good = entry.read_bytes()
    forged = json.loads(good) | {"fingerprint": "0" * 64}
    for content in (b"", good[:-2], b"[]", b"{}", good.replace(b"9", b"8"), json.dumps(forged).encode(), bytes(9)):
        reads.clear()
        entry.write_bytes(content)
        assert open_checkpoint(path).fingerprint == fingerprint and reads == ["a"]
        assert entry.read_bytes() == good
    save_file({"a": torch.zeros(3)}, path)
    assert open_checkpoint(path).fingerprint != fingerprint
    shutil.rmtree(scans)
    scans.write_text("in the way")  # a cache that cannot be written costs time, nothing else
    assert open_checkpoint(aged(path)).fingerprint != fingerprint


def test_a_file_changed_after_opening_is_refused(tmp_path: Path) -> None:
    """Also when the scan was already done."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    save_file({"a": torch.zeros(3)}, path)
    for access in (checkpoint.check, checkpoint.scan, lambda: checkpoint.fingerprint, lambda: checkpoint["a"]):
        with pytest.raises(CheckpointError, match=r"a.safetensors' changed after it was opened"):
            access()


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
    assert asked[0] == ("org/some-model.v2", "refs/pr/1", ["*.safetensors", "*.json"]) and asked[1][1] is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "gone").mkdir(parents=True)
    assert "has no .safetensors file" in refusal("org/gone")  # what is there goes before the hub


def test_missing_names_are_key_errors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Typed for the user, and what a Mapping promises: ``get`` and ``in`` work."""
    save_file(tensors, tmp_path / "a.safetensors")
    for checkpoint in (open_checkpoint(tmp_path / "a.safetensors"), open_checkpoint(tensors)):
        for access in (checkpoint.__getitem__, checkpoint.shape, checkpoint.dtype):
            with pytest.raises(CheckpointError, match=r"^'.*' has no tensor 'other'$"):
                access("other")
        assert checkpoint.get("other") is None and "other" not in checkpoint and "bias" in checkpoint


def test_dtypes_that_torch_lacks_are_refused_on_access(tmp_path: Path) -> None:
    """Every dtype of the format opens and has a fingerprint; shape and dtype are those of the tensor read."""
    header, end = {}, 0
    for dtype, bits in BITS.items():
        header[dtype] = {"dtype": dtype, "shape": [2, 8], "data_offsets": [end, end + 2 * bits]}
        end += 2 * bits
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    checkpoint.check()
    readable = {}
    for name in checkpoint:
        if name in ("F6_E2M3", "F6_E3M2"):
            with pytest.raises(CheckpointError, match=f"a.safetensors': tensor '{name}' has dtype {name}"):
                checkpoint[name]
        else:
            readable[name] = checkpoint[name]
            assert readable[name].dtype == checkpoint.dtype(name) and readable[name].shape == checkpoint.shape(name)
    (tmp_path / "b").mkdir()
    save_file(readable, tmp_path / "b" / "model.safetensors")
    assert StateDict(readable).fingerprint == open_checkpoint(tmp_path / "b").fingerprint


def test_mappings_of_other_things() -> None:
    """Meta and sparse tensors have no values to merge; keys are text; parameters are handed out without gradient."""
    for tensor in (torch.zeros(2, device="meta"), torch.zeros(2, 2).to_sparse()):
        assert "tensor 'a' of the state dict in memory has no plain values" in refusal({"a": tensor})
    assert "'a'" in refusal({"a": [1.0]}) and "'7'" in refusal({7: torch.ones(1)}) and "no tensors" in refusal({})
    checkpoint = open_checkpoint(torch.nn.Linear(2, 2).state_dict(keep_vars=True))
    assert not checkpoint["weight"].requires_grad
    assert (
        StateDict({"a": torch.arange(6.0).view(2, 3).T}).fingerprint
        == StateDict({"a": torch.arange(6.0).view(2, 3).T.contiguous()}).fingerprint
    )
