"""Compatibility: what an expert lacks or has too much is named, and so is the pattern that leaves it out."""

from fnmatch import fnmatchcase

import pytest
import torch
import transformers
from pico import ENCODER, VISION, random_model

from adamerge.checkpoints.checkpoint import StateDict
from adamerge.checkpoints.compatibility import refuse_extra, refuse_other, same_tensor
from adamerge.errors import CheckpointError
from adamerge.task_vectors.task_vectors import TaskVectors


def test_a_missing_tower_is_one_pattern():
    towers = transformers.CLIPConfig(text_config=ENCODER | {"bos_token_id": 1}, vision_config=VISION, projection_dim=16)
    base = random_model(transformers.CLIPModel, towers, 0).state_dict()
    vision = random_model(transformers.CLIPVisionModel, towers.vision_config, 1).state_dict()
    with pytest.raises(CheckpointError) as found:
        TaskVectors(base, {"cars": vision})
    missing = len([name for name in base if not name.startswith("vision_model.") and base[name].is_floating_point()])
    assert f"expert 'cars' lacks 'logit_scale' and {missing - 1} more (base has {len(base)}" in found.value.what
    patterns = ["logit_scale", "text_model.*", "text_projection.weight", "visual_projection.weight"]
    assert found.value.todo.startswith(f"pass exclude={patterns} to leave them at the base")
    assert len(TaskVectors(base, {"cars": vision}, exclude=patterns)) == len(vision)


def test_an_expert_with_nothing_of_the_base_is_told_so():
    with pytest.raises(CheckpointError) as found:
        refuse_other("a", StateDict({"y.w": torch.ones(1)}), StateDict({"x.w": torch.ones(1)}), ["x.w"])
    assert "it has none of these tensors" in found.value.todo and found.value.got == "0 of them"


def test_extra_tensors_are_left_out_by_pattern_but_never_the_bases():
    base = StateDict({"bert.w": torch.ones(1), "head.b": torch.ones(1)})
    extra = ["bert.pooler.b", "bert.pooler.w", "head.w", "head.x"]
    expert = StateDict(dict.fromkeys(["bert.w", *extra], torch.ones(1)))
    refuse_extra("a", expert, base, [])
    with pytest.raises(CheckpointError) as found:
        refuse_extra("a", expert, base, extra)
    assert found.value.what == "expert 'a' has 4 tensors that the base lacks, first 'bert.pooler.b'"
    assert found.value.todo.startswith("pass exclude=['bert.pooler.*', 'head.w', 'head.x'], or")


def test_all_that_differs_in_an_expert_is_left_out_by_one_advice():
    """A head of other classes, a tensor that is missing and one that is quantised: all in the first error."""
    base = StateDict({name: torch.ones(2) for name in ("conv.w", "bn.w", "fc.weight", "fc.bias", "extra.a", "extra.b")})
    changed = {"fc.weight": torch.ones(3), "fc.bias": torch.ones(3), "bn.w": torch.ones(2, dtype=torch.int8)}
    expert = StateDict({"conv.w": base["conv.w"], **changed})
    names = list(base)
    with pytest.raises(CheckpointError) as found:
        refuse_other("a", expert, base, names)
    patterns = ["bn.w", "extra.*", "fc.*"]
    assert f"pass exclude={patterns}" in found.value.todo
    left = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    refuse_other("a", expert, base, left)


def test_tensors_are_compared_by_their_values():
    one, other = (StateDict({"a": torch.ones(2), "b": torch.full((2,), value)}) for value in (1.0, 2.0))
    assert same_tensor("a", one, other) and not same_tensor("b", one, other)
