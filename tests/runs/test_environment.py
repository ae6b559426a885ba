"""The environment of a run: what is recorded, and that a change of what decides the numbers is refused."""

import json

import pytest
import torch
from lightning import Trainer
from toys import QUIET

from adamerge.errors import ConfigError
from adamerge.runs.environment import environment_of, refuse_difference
from adamerge.task_vectors.task_vectors import TaskVectors


def test_it_records_what_decides_the_numbers():
    found = environment_of(Trainer(max_steps=1, **QUIET))
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert (
        (found["world_size"], found["device"])
        == (1, "cpu")
        == tuple(environment_of(None)[k] for k in ("world_size", "device"))
    )
    assert json.loads(json.dumps(found)) == found
    assert (found["models"], found["data"]) == ({}, {})


def test_models_and_data_decide_too(pool, tmp_path):
    vectors = TaskVectors(**pool)
    found = environment_of(None, vectors, {"seed": 3, "transductive": False})
    assert found["models"].keys() == {"the base", *(f"expert '{task}'" for task in vectors.experts)}
    assert found["models"]["the base"] == vectors.base.fingerprint and found["data"]["seed"] == 3
    other = {**found, "models": {**found["models"], "the base": "other"}, "data": {**found["data"], "seed": 4}}
    (tmp_path / "environment.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="models changed") as caught:
        refuse_difference(tmp_path, found)
    assert caught.value.expected == {"models": {"the base": "other"}, "data": {"seed": 4}}
    assert caught.value.got == {"models": {"the base": vectors.base.fingerprint}, "data": {"seed": 3}}


KEYS = ("adamerge", "torch", "threads", "instructions", "world_size", "device", "models", "data")


@pytest.mark.parametrize("key", KEYS)
def test_a_change_is_refused_with_both_values(key, tmp_path):
    found = environment_of(None)
    (tmp_path / "environment.json").write_text(json.dumps({**found, key: "other"}))
    with pytest.raises(ConfigError, match=f"{key} changed") as caught:
        refuse_difference(tmp_path, found)
    assert caught.value.expected == {key: "other"} and caught.value.got == {key: found[key]}


def test_what_an_earlier_version_did_not_record_is_not_compared(tmp_path):
    found = environment_of(None)
    earlier = {key: value for key, value in found.items() if key != "instructions"}
    (tmp_path / "environment.json").write_text(json.dumps(earlier))
    refuse_difference(tmp_path, found)


def test_the_rest_may_change(tmp_path):
    found = environment_of(None)
    (tmp_path / "environment.json").write_text(json.dumps({**found, "platform": "other", "lightning": "other"}))
    refuse_difference(tmp_path, found)
