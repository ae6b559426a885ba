"""Loaders: from the step that is not done, the last labelled batch too, and tensors on the device."""

from types import SimpleNamespace

import datasets
import pytest
import torch

from adamerge.backbones import Batch, Teacher
from adamerge.data.batch_order import Steps
from adamerge.data.labels import Classes
from adamerge.data.loaders import eval_loader, on_device, running, train_loader
from adamerge.data.samples import Samples
from adamerge.errors import ConfigError

SAMPLES = Samples(
    datasets.Dataset.from_dict({"text": list("abcde")}), ["text"], lambda text: torch.tensor([ord(text)]), "letters"
)


def test_a_fit_has_a_loop_and_a_length():
    for loop in (None, SimpleNamespace(max_steps=-1), SimpleNamespace(max_steps=0)):
        with pytest.raises(ConfigError, match="max_steps is not set"):
            running(loop)
    loop = SimpleNamespace(max_steps=1)
    assert running(loop) is loop


def test_a_fit_goes_on_with_the_step_that_is_not_done():
    steps = Steps({"letters": SAMPLES}, None, batch_size=2, seed=0, total=6)
    loop = SimpleNamespace(max_steps=6, global_step=0, global_rank=0, world_size=1)
    loader = train_loader(steps, loop, 0)
    assert [batch["letters"].step for batch in loader] == [0, 1, 2, 3, 4, 5]
    loop.global_step = 4
    assert [batch["letters"].step for batch in loader] == [4, 5], "asked when an epoch begins, not when it is made"
    assert torch.equal(next(iter(loader))["letters"].inputs, steps[4]["letters"].inputs)


def test_evaluation_keeps_order_and_the_rest():
    batches = list(eval_loader(SAMPLES, Classes([0, 1, 2, 3, 4]), 2, 0))
    assert [len(batch.inputs) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([batch.inputs for batch in batches])[:, 0].tolist() == list(map(ord, "abcde"))


def full_batch() -> Batch:
    teacher = Teacher(torch.zeros(2, 3), None, [torch.zeros(2, 4), torch.zeros(2, 4)])
    inputs = {"tokens": torch.zeros(2, 5), "mask": torch.ones(2, 5)}
    lengths = {"tokens": torch.tensor([5, 2])}
    return Batch(inputs, torch.tensor([0, 1]), teacher, torch.tensor([7, 8]), 3, lengths=lengths)


def devices_of(value):
    if isinstance(value, torch.Tensor):
        return {value.device.type}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(devices_of, parts))


def test_all_tensors_go_to_the_device_but_numbers_and_lengths_of_the_samples():
    batch, meta = full_batch(), torch.device("meta")
    for there in (on_device({"letters": batch}, meta)["letters"], on_device(batch, meta)):
        assert there.indices is batch.indices and there.lengths is batch.lengths and there.step == 3
        assert devices_of(there._replace(indices=None, lengths=None)) == {"meta"}
        assert type(there.teacher) is Teacher and type(there.teacher.hidden) is list and there.teacher.classes is None
    same = on_device(batch, torch.device("cpu"))
    assert torch.equal(same.inputs["mask"], batch.inputs["mask"]) and same.labels.tolist() == [0, 1]


def test_only_what_cannot_be_read_unfinished_is_not_waited_for(monkeypatch):
    """As Lightning moves batches."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: asked.append(non_blocking) or self)
    for kind in ("cpu", "mps", "cuda", "xpu"):
        on_device(Batch(torch.zeros(1)), torch.device(kind))
    assert asked == [False, False, True, True]
