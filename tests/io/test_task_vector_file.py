"""The format of task vectors: a file says what it is, and what is wrong with it is told before it is used."""

import json

import pytest
import torch
from safetensors.torch import save_file

from adamerge.errors import CheckpointError
from adamerge.io.safetensors_file import TensorFile
from adamerge.io.task_vector_file import FIELDS, holds_task_vectors, is_task_vector_file, read_task_vectors, text_of

GOOD = {
    "version": "0.3.0",
    "merged": True,
    "solver": {"class_path": "adamerge.Wudi", "init_args": {}},
    "base": {"fingerprint": "abc"},
    "experts_from": {"base": {"fingerprint": "def"}},
    "transforms": [],
    "protocol": {},
}


def written(path, tensors=None, **changed):
    own = {key: value for key, value in {**GOOD, **changed}.items() if value is not None}
    save_file({"w": torch.ones(2, 3)} if tensors is None else tensors, path, metadata=text_of(own))
    return path


def test_a_good_one(tmp_path):
    path = written(tmp_path / "f")
    assert read_task_vectors(path) == {"format": 1, "kind": "task_vectors", **GOOD}
    assert is_task_vector_file(TensorFile(path)) and set(FIELDS) == {"format", "kind", *GOOD}


def test_what_a_configuration_names_is_told_apart(tmp_path):
    solved = written(tmp_path / "merged.safetensors")
    assert holds_task_vectors(solved) and holds_task_vectors(str(solved)) and holds_task_vectors("{task_vectors}")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(solved.read_bytes()[:-1])
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}.")
    (tmp_path / "folder.safetensors").mkdir()
    models = ["model", "cut", "pickle", "folder", "nothing", "a" * 300, "nul\0"]
    assert not any(holds_task_vectors(tmp_path / f"{name}.safetensors") for name in models)
    others = [None, "org/name@main", {"path": "x"}, "{previous}", "~nobody/x.safetensors", "org/base+org/adapter"]
    assert not any(map(holds_task_vectors, others))
    (tmp_path / "link").symlink_to(solved)
    assert holds_task_vectors(tmp_path / "link")


@pytest.mark.parametrize("name", ["{run}/1/task_vectors/merged.safetensors", "gone/task_vectors/x.safetensors"])
def test_a_runs_file_that_is_not_there_counts_so_that_who_opens_it_says_so(name):
    assert holds_task_vectors(name)


@pytest.mark.parametrize("text", [None, "", "no json", "[]", "3", json.dumps({"kind": "coefficients"}), "[" * 100_000])
def test_others_are_no_task_vectors(text, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "f", metadata=None if text is None else {"adamerge": text})
    assert not is_task_vector_file(TensorFile(tmp_path / "f"))
    with pytest.raises(CheckpointError, match="holds no task vectors"):
        read_task_vectors(tmp_path / "f")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"version": "99.0.0"}, "was written by adamerge 99.0.0"),
        ({"format": 2}, "unknown format"),
        ({"format": None}, "unknown format"),
        ({"solver": None}, r"missing fields \['solver'\]"),
        ({"more": 1}, r"missing fields \['more'\]"),
        ({"merged": 1}, "field 'merged'"),
        ({"merged": False}, r"missing fields \['experts'\]"),
        ({"experts": ["cars"]}, r"unknown or missing fields \['experts'\]"),
        ({"merged": False, "experts": "cars"}, "field 'experts'"),
        ({"merged": False, "experts": ["cars", 3]}, "field 'experts'"),
        ({"merged": False, "experts": ["cars", "cars"]}, "field 'experts'"),
        ({"merged": False, "experts": []}, "field 'experts'"),
        ({"base": {}}, "model 'the base'"),
        ({"base": {"fingerprint": 3}}, "model 'the base'"),
        ({"experts_from": {"cars": "x"}}, "model 'cars'"),
        ({"protocol": []}, "field 'protocol'"),
    ],
)
def test_metadata_are_checked(changed, words, tmp_path):
    own = {"format": 1, "kind": "task_vectors", **GOOD, **changed}
    own = {key: value for key, value in own.items() if value is not None}
    save_file({"w": torch.ones(2)}, tmp_path / "f", metadata={"adamerge": json.dumps(own)})
    with pytest.raises(CheckpointError, match=words):
        read_task_vectors(tmp_path / "f")


def test_a_delta_is_a_floating_point_tensor(tmp_path):
    with pytest.raises(CheckpointError, match="'n' is I64, which is no task vector"):
        read_task_vectors(written(tmp_path / "f", {"n": torch.tensor([1, 2])}))


def test_a_truncated_file(tmp_path):
    path = written(tmp_path / "f")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        read_task_vectors(path)
