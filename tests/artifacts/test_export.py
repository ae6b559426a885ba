"""Export: the folder holds exactly merge-then-cast, loads elsewhere, appears whole or not at all, and needs no memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import export, merged_tensors, size_of
from adamerge.artifacts.model_card import COEFFICIENTS_FILE
from adamerge.backbones import OpenClipClassifier
from adamerge.errors import CheckpointError, CoefficientsError, ConfigError, ExportError
from adamerge.io.model_folder import Layout
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import ChunkWise, LayerWise
from adamerge.task_vectors.storage import Disk, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Ties

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def learned(pool, tmp_path_factory) -> Path:
    """A coefficient file of the tiny open_clip pool."""
    vectors = TaskVectors(**pool, transforms=[Ties(0.6)])
    parametrization = ChunkWise(vectors, chunks=3)
    generator = torch.Generator().manual_seed(2)
    parametrization.load_values(
        {g: torch.rand(v.shape, generator=generator) for g, v in parametrization.values().items()}
    )
    layout = OpenClipClassifier(pool["base"]).layout()
    path = tmp_path_factory.mktemp("learned") / "coefficients.safetensors"
    save_coefficients(Coefficients(vectors, parametrization, layout, step=3, protocol={"seed": 1}), path)
    return path


@pytest.mark.parametrize("storage", [Resident(), Disk()], ids=["resident", "streamed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_merge_then_cast_exactly(pool, learned, tmp_path, dtype, storage):
    loaded = load_coefficients(learned)
    export(loaded, tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    merged = MergedModel(OpenClipClassifier(pool["base"]), loaded.task_vectors, loaded.parametrization, storage)
    merged.merge()
    base = load_file(Path(pool["base"]) / "open_clip_model.safetensors")
    assert written.keys() == base.keys() == merged.backbone.tensors().keys()
    moved = 0
    for name, tensor in merged.backbone.tensors().items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor.detach().to(dtype)), name
        if name.startswith("visual."):
            moved += not torch.equal(written[name], base[name].to(dtype))
        else:
            assert torch.equal(written[name], base[name].to(dtype)), name
    assert moved == len(loaded.task_vectors)


def test_tensors_are_those_of_the_formula(pool, tmp_path):
    vectors = TaskVectors(**pool)
    parametrization = LayerWise(vectors)
    generator = torch.Generator().manual_seed(8)
    values = {g: torch.rand(v.shape, generator=generator) for g, v in parametrization.values().items()}
    parametrization.load_values(values)
    export(Coefficients(vectors, parametrization), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(Path(pool["base"]) / "open_clip_model.safetensors")
    experts = [load_file(path) for path in pool["experts"].values()]
    for name, value in values.items():
        exact = base[name].double()
        for k, expert in enumerate(experts):
            exact = exact + value[k, 0].double() * (expert[name].double() - base[name].double())
        assert (written[name].double() - exact).abs().max() <= 3e-7 * max(1.0, float(exact.abs().max()))


def test_the_folder_loads_in_open_clip_with_the_logits_of_the_merged_model(pool, learned, tmp_path):
    loaded = load_coefficients(learned)
    export(loaded, tmp_path / "out")
    merged = MergedModel(OpenClipClassifier(pool["base"]), loaded.task_vectors, loaded.parametrization)
    merged.merge()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = merged.backbone.network.encode_image(images)
    torch.save({"images": images, "features": ours}, tmp_path / "expected.pt")
    code = """
        import sys, torch, open_clip
        expected = torch.load(sys.argv[2], weights_only=True)
        model = open_clip.create_model("local-dir:" + sys.argv[1], require_pretrained=True).eval()
        assert "adamerge" not in sys.modules
        with torch.no_grad():
            features = model.encode_image(expected["images"])
        worst = float((features - expected["features"]).abs().max())
        assert worst <= 1e-5 * max(1.0, float(features.abs().max())), worst
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out"), str(tmp_path / "expected.pt")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stderr


def test_the_folder_holds_config_card_and_coefficients_and_nothing_else(pool, learned, tmp_path):
    loaded = load_coefficients(learned)
    assert export(loaded, tmp_path / "out") == tmp_path / "out"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["README.md", "adamerge", "open_clip_config.json", "open_clip_model.safetensors"]
    )
    assert [p.name for p in (tmp_path / "out" / "adamerge").iterdir()] == ["coefficients.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\ntags:") and "- seed: 1" in card and "`colours`" in card and "`shapes`" in card
    # again from the exported folder's own copy: the same weights, once it is told where the models are
    with pytest.raises(CoefficientsError, match="does not say where the base is") as found:
        load_coefficients(tmp_path / "out" / COEFFICIENTS_FILE)
    assert found.value.todo == "point to it with --base PATH" and "'base'" in str(found.value)
    again = load_coefficients(tmp_path / "out" / COEFFICIENTS_FILE, pool["base"], pool["experts"])
    assert all(
        torch.equal(value, loaded.parametrization.values()[g]) for g, value in again.parametrization.values().items()
    )
    export(again, tmp_path / "again")
    for name in ("open_clip_model.safetensors", "open_clip_config.json", "README.md", COEFFICIENTS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_large_model_of_transformers_is_several_files(tmp_path):
    """Which transformers loads, and which are a base again; the tensors are those of one file."""
    from pico import pico_pool
    from transformers import AutoModelForCausalLM

    pool = pico_pool("llama", tmp_path / "pool")
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"], exclude=pool["exclude"])
    made = Coefficients(vectors, LayerWise(vectors, init=0.3), pool["backbone"]().layout())
    numbers, nbytes = size_of(made)
    export(made, tmp_path / "one")
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert (numbers, nbytes) == (sum(t.numel() for t in one.values()), sum(t.nbytes for t in one.values()))
    export(made, tmp_path / "many", shard_size=nbytes / 3e9)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) >= 3 and not (tmp_path / "many" / "model.safetensors").exists()
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= nbytes / 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many", local_files_only=True).state_dict()
    again = TaskVectors(tmp_path / "many", {"a": tmp_path / "one"}).base
    assert again.keys() == one.keys() and all(torch.equal(again[name], one[name]) for name in one)
    assert one.keys() <= loaded.keys() and all(torch.equal(loaded[name], one[name]) for name in one)


def test_open_clip_reads_one_file_whatever_its_size(learned, tmp_path):
    export(load_coefficients(learned), tmp_path / "out", shard_size=1e-9)
    assert [path.name for path in (tmp_path / "out").glob("*model*")] == ["open_clip_model.safetensors"]


@pytest.mark.parametrize("size", [0, -1, float("nan")])
def test_a_size_of_files_that_is_none_is_refused(learned, tmp_path, size):
    with pytest.raises(ConfigError, match="shard_size must be positive"):
        export(load_coefficients(learned), tmp_path / "out", shard_size=size)
    assert not (tmp_path / "out").exists()


def test_what_a_network_keeps_in_fp32_is_exported_so(tmp_path):
    """T5 in float16 keeps a projection in fp32: rounded, the folder would compute something else than what was merged."""
    from pico import pico_pool
    from transformers import AutoModelForSeq2SeqLM

    pool = pico_pool("t5", tmp_path / "pool")
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"], exclude=pool["exclude"])
    backbone = pool["backbone"]("float16")
    merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3))
    kept = {name for name, tensor in backbone.tensors().items() if tensor.dtype == torch.float32}
    assert merged.dtype == torch.float16 and kept and all(".wo." in name for name in kept)
    with torch.no_grad():
        merged.merge()
    made = Coefficients(vectors, merged.parametrization, backbone.layout(), dtype=merged.dtype)
    save_coefficients(made, tmp_path / "c.safetensors")
    export(load_coefficients(tmp_path / "c.safetensors"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in backbone.tensors().items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor.detach()), name
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", local_files_only=True).state_dict()
    assert all(loaded[name].dtype == torch.float32 and torch.equal(loaded[name], written[name]) for name in kept)


def test_the_default_dtype_is_that_of_the_merged_copy(pool, tmp_path):
    vectors = TaskVectors(**pool)
    export(Coefficients(vectors, LayerWise(vectors), dtype=torch.bfloat16), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_buffers_keep_their_dtype_and_odd_shapes_survive(tmp_path):
    base = {
        "w": torch.randn(3), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), "ids": torch.arange(5),
        "mask": torch.tensor([True, False]), "small": torch.ones(2, dtype=torch.uint8),
        "halves": torch.ones(3, dtype=torch.float16),
    }  # fmt: skip
    expert = {name: value + 1 if value.is_floating_point() else value for name, value in base.items()}
    vectors = TaskVectors(base, {"one": expert}, exclude=["small"])
    coefficients = Coefficients(vectors, LayerWise(vectors, init=0.5))
    export(coefficients, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.dtype for name, value in written.items()} == {
        name: torch.float32 if value.is_floating_point() else value.dtype for name, value in base.items()
    }
    for name, value in written.items():
        expected = base[name] + 0.5 if base[name].is_floating_point() else base[name]
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_tensors_of_rarer_dtypes_are_copied_or_refused_by_name(tmp_path, dtype):
    base = {"w": torch.randn(3), "codes": torch.ones(4).to(dtype)}
    vectors = TaskVectors(base, {"one": {"w": base["w"] + 1}}, exclude=["codes"])
    try:
        export(Coefficients(vectors, LayerWise(vectors)), tmp_path / "out")
    except ExportError as error:
        assert "codes" in error.what and not (tmp_path / "out").exists()
    else:
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["codes"].float(), base["codes"].float())


# what stands there --------------------------------------------------------------------------------------------------


def test_an_existing_target_is_refused_and_left_alone_until_it_is_to_be_replaced(learned, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("precious")
    loaded = load_coefficients(learned)
    with pytest.raises(ExportError, match="exists") as found:
        export(loaded, target)
    assert "--overwrite" in found.value.todo
    assert [(p.name, p.read_text()) for p in target.iterdir()] == [("old.txt", "precious")]
    export(loaded, target, overwrite=True)
    assert "old.txt" not in [p.name for p in target.iterdir()] and (target / "README.md").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_no_input_is_ever_the_target(pool, learned, tmp_path, overwrite):
    loaded = load_coefficients(learned)
    before = sorted(str(p) for p in Path(pool["base"]).parent.rglob("*"))
    for target in (Path(pool["base"]), Path(pool["base"]) / "merged", Path(pool["base"]).parent):
        with pytest.raises(ExportError):
            export(loaded, target, overwrite=overwrite)
    assert sorted(str(p) for p in Path(pool["base"]).parent.rglob("*")) == before


def copied(pool: dict, folder: Path) -> dict:
    """The pool's files once more, to be spoilt."""
    folder.mkdir()
    save_file(load_file(Path(pool["base"]) / "open_clip_model.safetensors"), folder / "base.safetensors")
    for task, path in pool["experts"].items():
        save_file(load_file(path), folder / f"{task}.safetensors")
    return {"base": folder / "base.safetensors", "experts": {t: folder / f"{t}.safetensors" for t in pool["experts"]}}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_and_the_old_folder_stays(pool, tmp_path, number):
    paths = copied(pool, tmp_path / "models")
    bad = load_file(paths["experts"]["shapes"])
    bad["visual.proj"][0, 0] = number
    save_file(bad, paths["experts"]["shapes"])
    vectors = TaskVectors(**paths, include=["visual.*"])
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"shapes.safetensors.*visual\.proj"):
        export(Coefficients(vectors, LayerWise(vectors)), target, overwrite=True)
    assert [p.name for p in target.iterdir()] == ["old.txt"] and not list(tmp_path.glob(".*"))


def test_a_model_that_changes_meanwhile_is_refused(pool, tmp_path, monkeypatch):
    from adamerge.artifacts import export as _  # noqa: F401  # the function; the module is taken from sys.modules

    module = sys.modules["adamerge.artifacts.export"]
    paths = copied(pool, tmp_path / "models")
    vectors = TaskVectors(**paths, include=["visual.*"])
    write = module.write_weights

    def write_and_touch(*args):
        written = write(*args)
        changed = load_file(paths["experts"]["colours"])
        changed["visual.proj"] += 1
        save_file(changed, paths["experts"]["colours"])
        return written

    monkeypatch.setattr(module, "write_weights", write_and_touch)
    with pytest.raises(CheckpointError, match="colours.safetensors"):
        export(Coefficients(vectors, LayerWise(vectors)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_lies_is_found_out(learned, tmp_path, monkeypatch):
    module = sys.modules["adamerge.artifacts.export"]
    write = module.write_weights

    def write_and_rot(folder, name, *args):
        written, path = write(folder, name, *args), folder / name
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        return written

    monkeypatch.setattr(module, "write_weights", write_and_rot)
    with pytest.raises(ExportError, match="does not read back"):
        export(load_coefficients(learned), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", "", "."])
@pytest.mark.parametrize("place", ["weights", "files"])
def test_a_layout_cannot_write_outside_its_folder(learned, tmp_path, name, place):
    loaded = load_coefficients(learned)
    layout = Layout(name, {}) if place == "weights" else Layout("w.safetensors", {name: "x"})
    with pytest.raises(CoefficientsError, match="unsafe file"):
        export(Coefficients(loaded.task_vectors, loaded.parametrization, layout), tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800.json"], ids=["nul", "long", "surrogate"])
def test_a_layout_of_impossible_names_is_a_typed_error(learned, tmp_path, name):
    loaded = load_coefficients(learned)
    with pytest.raises((CoefficientsError, ExportError)):
        export(Coefficients(loaded.task_vectors, loaded.parametrization, Layout("w", {name: "x"})), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# memory ---------------------------------------------------------------------------------------------------------------


def test_one_tensor_at_a_time(learned):
    import weakref

    alive = []
    for name, tensor in merged_tensors(load_coefficients(learned), torch.bfloat16):
        assert sum(reference() is not None for reference in alive) <= 1, name
        alive.append(weakref.ref(tensor))
        del tensor
    assert len(alive) > 30


CHILD = """
import sys, threading, time
from pathlib import Path
import torch
from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.export import export
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.storage import Disk, Resident
from adamerge.task_vectors.task_vectors import TaskVectors

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

root = Path(sys.argv[1])
vectors = TaskVectors(root / "base.safetensors", {k: root / f"{k}.safetensors" for k in ("one", "two")}, include=["visual.*"])
coefficients = Coefficients(vectors, LayerWise(vectors))
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
export(coefficients, root / "out")
done = True
thread.join()
print(peak - start)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_exporter_holds_a_few_tensors_never_a_model(tmp_path):
    torch.manual_seed(0)
    weights = OpenClipClassifier("ViT-B-32-quickgelu").network.state_dict()
    save_file(weights, tmp_path / "base.safetensors")
    for task in ("one", "two"):
        moved = {n: v + 1e-3 * torch.randn_like(v) for n, v in weights.items() if n.startswith("visual.")}
        save_file(moved, tmp_path / f"{task}.safetensors")
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    model, largest = 4 * sum(v.numel() for v in weights.values()), 4 * max(v.numel() for v in weights.values())
    print(f"exporter: {int(run.stdout) >> 20} MiB, largest tensor {largest >> 20} MiB, model {model >> 20} MiB")
    assert int(run.stdout) < 2 * largest < model / 2
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    for path in sorted(tmp_path.rglob("*.safetensors")):
        path.unlink()


def test_the_exported_folder_is_a_base_again(learned, tmp_path):
    export(load_coefficients(learned), tmp_path / "out")
    backbone = OpenClipClassifier(str(tmp_path / "out"))
    weights = open_clip.create_model(f"local-dir:{tmp_path / 'out'}", require_pretrained=True).state_dict()
    vectors = TaskVectors(
        tmp_path / "out" / "open_clip_model.safetensors", {"one": {n: v + 1 for n, v in weights.items()}}
    )
    merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.0))
    merged.merge()
    for name, tensor in backbone.tensors().items():
        assert torch.equal(tensor, weights[name])
