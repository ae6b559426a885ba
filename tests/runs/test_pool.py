"""A pool from headers: every problem of every expert, not the first one."""

import json

import pytest
import torch
from safetensors.torch import save_file
from task_vectors.test_memory import with_adapter

from adamerge.errors import CheckpointError
from adamerge.runs.pool import open_pool

BASE = {"a.weight": torch.zeros(6, 4), "a.bias": torch.zeros(4), "b.weight": torch.zeros(3, 3), "c": torch.zeros(2)}


@pytest.fixture
def pool(tmp_path):
    """A configuration with a good expert and some that are not."""
    strange = {**BASE, "a.weight": torch.zeros(5, 4), "b.weight": torch.zeros(3, 2), "own": torch.zeros(1)}
    del strange["c"]
    quantised = {**BASE, "a.weight": torch.zeros(6, 4, dtype=torch.int8), "c": torch.zeros(2, dtype=torch.int32)}
    models = {"base": BASE, "good": BASE, "strange": strange, "quantised": quantised}
    for name, weights in models.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-3])
    experts = {name: str(tmp_path / f"{name}.safetensors") for name in (*models, "torn", "gone") if name != "base"}
    experts["lora"] = str(with_adapter(tmp_path))
    return {"base": str(tmp_path / "base.safetensors"), "experts": experts}


def messages(found):
    return {who: [error.what for error in errors] for who, errors in found.problems.items()}


def test_all_problems_are_listed(pool):
    found = open_pool(pool, {})
    told = messages(found)
    assert list(found.good) == ["good", "lora"] and set(found.experts) == {"good", "lora", "strange", "quantised"}
    assert told.keys() == {"strange", "quantised", "torn", "gone"}
    assert ["shape" in line for line in told["strange"]] == [True, True, False, False]
    assert "lacks 'c'" in told["strange"][2] and "1 tensors that the base lacks, first 'own'" in told["strange"][3]
    assert ["torch.int8" in line or "torch.int32" in line for line in told["quantised"]] == [True, True]
    assert "truncated" in told["torn"][0] and "no such file" in told["gone"][0]
    assert all(isinstance(error, CheckpointError) for errors in found.problems.values() for error in errors)


def test_patterns_leave_what_does_not_fit(pool):
    pool["exclude"] = ["a.weight", "b.*", "c", "own"]
    assert messages(open_pool(pool, {})).keys() == {"torn", "gone"}


def test_a_base_that_cannot_be_opened_is_the_only_problem(pool):
    pool["base"] += ".gone"
    found = open_pool(pool, {})
    assert found.problems.keys() == {"base"} and not found.experts


def test_what_was_opened_is_not_opened_again(pool, monkeypatch):
    opened: dict = {}
    first = open_pool(pool, opened)
    monkeypatch.setattr("adamerge.runs.pool.open_headers", lambda source, base: pytest.fail(source))
    pool["experts"] = {t: s for t, s in pool["experts"].items() if t in first.experts}
    assert open_pool(pool, opened).experts.keys() == first.experts.keys()


def test_an_adapter_of_another_base(pool, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    factors = {"lora_A": torch.randn(2, 9), "lora_B": torch.randn(6, 2)}
    named = {f"base_model.model.a.{k}.weight": v for k, v in factors.items()}
    save_file(named, other / "adapter_model.safetensors")
    pool["experts"] = {"other": str(other)}
    assert "does not belong to this base" in messages(open_pool(pool, {}))["other"][0]


def test_a_quantised_expert_is_called_so(pool, tmp_path):
    """Of packed weights all that is seen else is that tensors are missing and that others are there."""
    packed = {
        "a.qweight": torch.zeros(3, 4, dtype=torch.int32),
        "a.scales": torch.zeros(1, 4),
        "a.bias": torch.zeros(4),
    }
    folder = tmp_path / "packed"
    folder.mkdir()
    save_file({**BASE, **packed} | {"b.qweight": torch.zeros(1, dtype=torch.int32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    pool["experts"] = {"packed": str(folder)}
    told = messages(open_pool(pool, {}))["packed"]
    assert told[0] == "expert 'packed' is quantised: its config.json has quantization_config, method 'gptq'"
    assert len(told) > 1 and "base lacks" in told[1]
    # a fit would take the rest, and so does check
    pool["exclude"] = ["*.qweight", "*.scales"]
    assert not messages(open_pool(pool, {}))
