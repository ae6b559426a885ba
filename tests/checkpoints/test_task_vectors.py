"""A file of task vectors as an expert: its deltas are read as they are stored; names, shapes and values are checked."""

import pytest
import torch
from safetensors.torch import save_file

from adamerge.checkpoints.opening import open_checkpoint
from adamerge.checkpoints.task_vectors import TaskVectorCheckpoint
from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.groups import Whole
from adamerge.errors import CheckpointError
from adamerge.io.task_vector_file import text_of
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(1)
    weights = {
        "a.weight": torch.randn(4, 3),
        "a.bias": torch.randn(4),
        "b.weight": torch.randn(2, 2),
        "n": torch.tensor(3),
    }
    save_file(weights, tmp_path / "base.safetensors")
    return open_checkpoint(tmp_path / "base.safetensors")


DELTAS = {
    "a.weight": 1e-6 * torch.arange(12.0).view(4, 3) + 1e-9,
    "b.weight": torch.tensor([[0.5, -1e-7], [0.0, 3e-8]]),
}


def written(path, base, deltas=DELTAS, fingerprint=None):
    metadata = {
        "version": "0.3.0",
        "merged": True,
        "solver": {"class_path": "adamerge.Wudi", "init_args": {}},
        "base": {"fingerprint": base.fingerprint if fingerprint is None else fingerprint},
        "experts_from": {},
        "transforms": [],
        "protocol": {},
    }
    save_file(deltas, path, metadata=text_of(metadata))
    return path


def test_deltas_come_back_as_they_were_stored(base, tmp_path):
    path = written(tmp_path / "merged.safetensors", base)
    vectors = TaskVectors(base, {"merged": path})
    assert list(vectors) == ["a.weight", "b.weight"], "what it lacks it did not change"
    stored = vectors.in_memory("cpu", lambda deltas, _: DenseDeltas(deltas.dense()), lambda tensor: tensor)
    for name, delta in DELTAS.items():
        assert torch.equal(stored[name].dense()[0], delta)
        assert torch.equal(vectors[name].dense()[0], delta), "not (theta0 + tau) - theta0"
        assert not torch.equal((base[name] + delta) - base[name], delta), "which would be something else"
        assert torch.equal(vectors[name].summed(torch.tensor([[1.0]]), Whole()).view(delta.shape), delta)


def test_it_reads_as_the_model_that_it_makes(base, tmp_path):
    one = open_checkpoint(written(tmp_path / "merged.safetensors", base), base)
    assert isinstance(one, TaskVectorCheckpoint) and list(one) == list(base)
    assert torch.equal(one["a.weight"], base["a.weight"] + DELTAS["a.weight"])
    assert torch.equal(one["a.bias"], base["a.bias"]) and torch.equal(one["n"], base["n"])
    assert one.dtype("a.weight") == torch.float32 and one.dtype("n") == torch.int64
    assert one.shape("b.weight") == (2, 2) and one.sources == (tmp_path / "merged.safetensors",)
    assert one.factors("a.bias").rank == 0 and one.factors("a.weight") is None and one.delta("a.bias") is None
    one.check()


def test_beside_other_experts(base, tmp_path):
    other = {name: base[name] + 1 if name != "n" else base[name] for name in base}
    vectors = TaskVectors(base, {"o": other, "merged": written(tmp_path / "m.safetensors", base), "p": other})
    rows = vectors["a.weight"].dense()
    assert torch.equal(rows[1], DELTAS["a.weight"]) and torch.equal(rows[0], rows[2])
    assert (rows[0] - 1).abs().max() < 1e-6
    bias = vectors["a.bias"].dense()
    assert torch.equal(bias[1], torch.zeros(4)) and (bias[0] - 1).abs().max() < 1e-6
    moved = vectors.to("cpu")
    assert torch.equal(moved["a.weight"].dense(), rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_of_deltas_and_base(dtype, base, tmp_path):
    deltas = {name: delta.to(dtype) for name, delta in DELTAS.items()}
    vectors = TaskVectors(base, {"merged": written(tmp_path / "m.safetensors", base, deltas)})
    assert torch.equal(vectors["b.weight"].dense()[0], deltas["b.weight"].float())


def test_sums_by_pieces(base, tmp_path, cut):
    cut(5)
    vectors = TaskVectors(base, {"merged": written(tmp_path / "m.safetensors", base)})
    assert torch.equal(vectors["a.weight"].summed(torch.tensor([[2.0]]), Whole()), 2 * DELTAS["a.weight"].flatten())
    gradient = torch.ones(4, 3)
    assert (vectors["a.weight"].contract(gradient, Whole()) - DELTAS["a.weight"].sum()).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("deltas", "words"),
    [
        ({"a.weight": torch.ones(3, 4)}, "'a.weight' has another shape than in the base"),
        ({"a.weight": torch.ones(4, 3), "c": torch.ones(2)}, "1 task vectors of tensors that the base lacks: 'c'"),
        ({"n": torch.tensor(1)}, "'n' is I64"),
    ],
)
def test_what_is_not_the_bases_is_refused(deltas, words, base, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        TaskVectors(base, {"merged": written(tmp_path / "m.safetensors", base, deltas)})


def test_numbers_that_are_none(base, tmp_path):
    deltas = {"a.weight": torch.full((4, 3), float("nan"))}
    vectors = TaskVectors(base, {"merged": written(tmp_path / "m.safetensors", base, deltas)})
    with pytest.raises(CheckpointError, match=r"NaN or Inf in 1 of .* tensors: 'a.weight' \(12\)"):
        vectors.check()


def test_another_base_of_the_same_shapes(base, tmp_path):
    vectors = TaskVectors(base, {"merged": written(tmp_path / "m.safetensors", base, fingerprint="f" * 64)})
    with pytest.raises(CheckpointError, match="holds task vectors of another base"):
        vectors.check()


def test_alone_it_is_no_model(base, tmp_path):
    path = written(tmp_path / "m.safetensors", base)
    with pytest.raises(CheckpointError, match="holds task vectors and is no model"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="base: .*holds task vectors and is no model"):
        TaskVectors(path, {"one": base})


def test_a_truncated_file(base, tmp_path):
    path = written(tmp_path / "m.safetensors", base)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        TaskVectors(base, {"merged": path})


def test_its_fingerprint_is_that_of_the_deltas(base, tmp_path):
    one, other = (
        open_checkpoint(written(tmp_path / f"{n}.safetensors", base, d), base)
        for n, d in (("x", DELTAS), ("y", {**DELTAS, "b.weight": DELTAS["b.weight"] + 1}))
    )
    again = open_checkpoint(written(tmp_path / "z.safetensors", base), base)
    assert one.fingerprint == again.fingerprint != other.fingerprint
