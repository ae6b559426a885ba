"""Teachers of samples: what is kept, and that what comes back at the positions that count is what the expert said."""

import pytest
import torch

from adamerge.backbones import Encoded, Output, Teacher
from adamerge.data.teacher_outputs import compact, digest_of, expanded, stack_teachers

MASK = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


FLIPPED = MASK.flip(1)


def output(mask=MASK, hidden_mask=FLIPPED, hidden=2, dtype=torch.float32):
    torch.manual_seed(0)
    shape = (3, 5) if mask is not None else (3,)
    states = tuple(torch.randn(3, 5, 4) for _ in range(hidden))
    logits = 3 * torch.randn(*shape, 7)
    return Output(logits.to(dtype), Encoded(torch.randn(*shape, 4), states, mask, hidden_mask))


def test_counted_positions_come_back_and_the_rest_is_zero():
    made = output()
    teachers = [expanded(kept) for kept in compact(made, None, None)]
    assert [len(teacher.logits) for teacher in teachers] == [3, 4, 0], "nothing behind the last position that counts"
    for i, teacher in enumerate(teachers):
        places = MASK[i, : len(teacher.logits)]
        assert torch.equal(teacher.logits[places], made.logits[i][MASK[i]]) and not teacher.logits[~places].any()
        assert teacher.classes is None
        for states, source in zip(teacher.hidden, made.encoded.hidden, strict=True):
            counted = FLIPPED[i]
            assert torch.equal(states[counted[: len(states)]], source[i][counted])


def test_only_counted_positions_take_memory():
    kept = compact(output(), None, None)
    assert [len(one["logits"]) for one in kept] == [2, 2, 0]
    assert all(one["logits"].untyped_storage().nbytes() == one["logits"].nbytes for one in kept)


def test_without_masks_everything_is_kept():
    made = output(mask=None, hidden_mask=None)
    for i, teacher in enumerate(map(expanded, compact(made, None, None))):
        assert torch.equal(teacher.logits, made.logits[i])
        assert all(torch.equal(a, b[i]) for a, b in zip(teacher.hidden, made.encoded.hidden, strict=True))


def test_without_hidden_states():
    assert all(expanded(kept).hidden == () for kept in compact(output(hidden=0), None, None))


def test_the_largest_logits_and_their_classes():
    made = output()
    for i, teacher in enumerate(map(expanded, compact(made, 3, None))):
        for position in MASK[i].nonzero().flatten().tolist():
            right = made.logits[i, position].sort(descending=True)
            assert torch.equal(teacher.logits[position], right.values[:3])
            assert teacher.classes[position].tolist() == right.indices[:3].tolist()
    assert all(expanded(kept).classes is None for kept in compact(made, 7, None)), "all of them need no list"


def test_half_precision_keeps_the_distribution_of_huge_logits():
    made = output(mask=None, hidden=0)
    shifted = Output(made.logits + 1e6, made.encoded)  # far above the largest float16
    (kept, *_) = compact(shifted, None, "float16")
    assert kept["logits"].dtype == torch.float16 and kept["logits"].max() == 0
    p, right = kept["logits"].double().softmax(-1), shifted.logits[0].double().softmax(-1)
    assert (p - right).abs().max() < 1e-3
    assert compact(output(dtype=torch.bfloat16), None, "float32")[0]["logits"].dtype == torch.bfloat16


def test_samples_of_different_length_make_a_batch():
    teachers = [
        Teacher(torch.ones(n, 2), torch.full((n, 2), n), (torch.ones(n, 3), torch.ones(n + 1, 4))) for n in (2, 4)
    ]
    batch = stack_teachers(teachers)
    assert batch.logits.shape == (2, 4, 2) and batch.classes.shape == (2, 4, 2)
    assert [states.shape for states in batch.hidden] == [(2, 4, 3), (2, 5, 4)]
    assert batch.logits[0, 2:].sum() == 0 and batch.logits.sum() == 12
    alone = stack_teachers([Teacher(torch.ones(3)), Teacher(torch.zeros(3))])
    assert alone.classes is None and alone.hidden == () and alone.logits.tolist() == [[1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(
    "other",
    [torch.tensor([1, 2, 4]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1, 2, 3]]), {"a": torch.tensor([1, 2, 3])}],
)
def test_a_digest_tells_contents_apart(other):
    assert digest_of(torch.tensor([1, 2, 3])) == digest_of(torch.tensor([1, 2, 3]))
    assert digest_of(torch.tensor([1, 2, 3])) != digest_of(other)


def test_a_digest_takes_every_dtype_and_goes_by_name():
    inputs = {"a": torch.tensor(True), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.zeros(0)}
    assert digest_of(inputs) == digest_of(dict(reversed(inputs.items())))
    assert digest_of(inputs) != digest_of({**inputs, "a": torch.tensor(False)})
