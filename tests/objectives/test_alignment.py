"""Alignment: numbers by hand, gradients in float64, positions that do not count, the largest logits alone."""

import math

import pytest
import torch

from adamerge.backbones import Batch, Encoded, Output, Teacher
from adamerge.backbones.hidden_states import state_number
from adamerge.errors import ConfigError, DataError
from adamerge.objectives import HiddenAlignment, LogitAlignment, NormalisedHiddenAlignment, SummedHiddenAlignment

LN3 = math.log(3.0)


def kl(ours, theirs, mask=None, classes=None, **arguments):
    output = Output(ours, Encoded(torch.zeros(len(ours), 1), mask=mask))
    return LogitAlignment(**arguments)(output, Batch(torch.zeros(len(ours), 1), teacher=Teacher(theirs, classes)))


def by_definition(ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 sum_c p_c log(p_c / q_c) in float64, of the last dimension."""
    p, q = (torch.exp(z.double() / temperature) for z in (theirs, ours))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return temperature**2 * (p * torch.log(p / q)).sum(-1)


def test_three_numbers_by_hand():
    ours = torch.tensor([[0.0, 0.0], [0.0, LN3], [7.0, 7.0]])
    theirs = torch.tensor([[0.0, LN3], [0.0, LN3], [0.0, float("-inf")]])
    # p = (1/4, 3/4), q = (1/2, 1/2): 1/4 log 1/2 + 3/4 log 3/2 = 0.1308120;   p = (1, 0), q = (1/2, 1/2): log 2
    assert kl(ours, theirs).tolist() == pytest.approx([0.1308120, 0.0, math.log(2)], abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_loss_and_gradient_are_those_of_the_formula(temperature):
    torch.manual_seed(0)
    ours, theirs = torch.randn(4, 3, 7, requires_grad=True), torch.randn(4, 3, 7)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    losses = kl(ours, theirs, mask, temperature=temperature)
    reference = ours.detach().double().requires_grad_(True)
    per_position = by_definition(reference, theirs, temperature)
    expected = torch.stack([row[kept].mean() for row, kept in zip(per_position, mask, strict=True)])
    assert torch.allclose(losses.double(), expected, atol=1e-6)
    found, right = torch.autograd.grad(losses.sum(), ours)[0], torch.autograd.grad(expected.sum(), reference)[0]
    assert (found.double() - right).abs().max() < 1e-6


def test_it_is_soft_cross_entropy_up_to_the_experts_entropy():
    torch.manual_seed(1)
    ours, theirs = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    p = (theirs / 2).softmax(-1)
    cross_entropy = -4 * (p * (ours / 2).log_softmax(-1)).sum(-1)
    entropy = -4 * (p * p.log()).sum(-1)
    assert torch.allclose(
        kl(ours.float(), theirs.float(), temperature=2.0).double(), cross_entropy - entropy, atol=1e-6
    )


def test_positions_that_do_not_count_change_nothing():
    torch.manual_seed(2)
    ours, theirs = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 1, 0]], dtype=torch.bool)
    changed = torch.where(mask[..., None], theirs, 100 * torch.randn(2, 5, 4))
    one, other = kl(ours, theirs, mask), kl(ours, changed, mask)
    assert torch.equal(one, other)
    gradients = [torch.autograd.grad(losses.sum(), ours)[0] for losses in (one, other)]
    assert torch.equal(*gradients) and not gradients[0][~mask].any() and gradients[0][mask].all()
    # the student's batch is padded to the longest of all tasks, the teacher's to this task's
    longer = torch.cat([ours, torch.randn(2, 3, 4)], dim=1)
    assert torch.equal(kl(longer, theirs, torch.nn.functional.pad(mask, (0, 3))), one)


def test_the_largest_logits_alone():
    """Both renormalised over the classes kept: the others neither enter nor get a gradient."""
    ours = torch.tensor([[0.0, LN3, 9.0], [1.0, 2.0, 3.0]], requires_grad=True)
    kept = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32)
    theirs = torch.tensor([[0.0, 0.0], [6.0, 5.0]])  # p = (1/2, 1/2) against q = (3/4, 1/4); equal odds
    losses = kl(ours, theirs, classes=kept)
    assert losses.tolist() == pytest.approx([0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.0], abs=1e-6)
    gradient = torch.autograd.grad(losses.sum(), ours)[0]
    assert gradient[0].tolist() == pytest.approx([-0.25, 0.25, 0.0], abs=1e-6)


def test_all_classes_as_the_largest_is_the_whole_divergence():
    torch.manual_seed(3)
    ours, theirs = torch.randn(3, 2, 6), torch.randn(3, 2, 6)
    values, classes = theirs.topk(6, dim=-1)
    assert torch.allclose(kl(ours, values, classes=classes), kl(ours, theirs), atol=1e-6)


def test_half_precision_is_computed_in_fp32():
    torch.manual_seed(4)
    ours, theirs = torch.randn(3, 5).bfloat16(), torch.randn(3, 5).half()
    assert kl(ours, theirs).dtype == torch.float32
    assert torch.allclose(kl(ours, theirs).double(), by_definition(ours, theirs, 1.0), atol=1e-6)


def hidden(ours, theirs, layers, mask=None, kind=HiddenAlignment):
    batch = Batch(torch.zeros(len(ours[0]), 1), teacher=Teacher(torch.zeros(len(ours[0]), 2), hidden=tuple(theirs)))
    encoded = Encoded(torch.zeros(len(ours[0]), 1), tuple(ours), hidden_mask=mask)
    return kind(layers)(Output(torch.zeros(len(ours[0]), 2), encoded), batch)


def test_hidden_distance_by_hand():
    # positions (1, 2) and (0, 4) against zeros: means of squares 2.5 and 8; the second layer is off by 2 everywhere
    ours = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]]), torch.full((1, 2, 3), 2.0)
    theirs = torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)
    assert hidden(ours, theirs, [1, -1]).tolist() == pytest.approx([((2.5 + 8) / 2 + 4) / 2])
    assert hidden(ours[:1], theirs[:1], [1], torch.tensor([[True, False]])).tolist() == pytest.approx([2.5])


def test_summed_hidden_distance_by_hand():
    """Squared norms 5 and 16, mean 10.5; in the second layer 12 at each position; of the first position alone 5."""
    ours = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]]), torch.full((1, 2, 3), 2.0)
    theirs = torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)
    assert hidden(ours, theirs, [1, 0.5], kind=SummedHiddenAlignment).tolist() == [22.5]
    mask = torch.tensor([[True, False]])
    assert hidden(ours[:1], theirs[:1], [1], mask, SummedHiddenAlignment).tolist() == [5.0]


def test_hidden_positions_that_do_not_count_change_nothing():
    torch.manual_seed(5)
    ours, theirs = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 3, 3)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    changed = torch.where(mask[:, :3, None], theirs, 50 * torch.randn(2, 3, 3))
    one, other = (hidden([ours], [states], [2], mask) for states in (theirs, changed))
    assert torch.equal(one, other)
    gradient = torch.autograd.grad(one.sum(), ours)[0]
    expected = 2 * (ours[:, :3].detach().double() - theirs) / 3 / mask.sum(1)[:, None, None]
    assert not gradient[~mask].any()
    assert (gradient[:, :3][mask[:, :3]].double() - expected[mask[:, :3]]).abs().max() < 1e-6


def test_normalised_hidden_distance_by_hand():
    """The expert's 1, 3, 5, 7 have mean 4 and variance 5: a distance of 10 is twice that; saying the mean for all is 1."""
    theirs = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    ours = theirs + torch.tensor([[[2.0, 4.0], [4.0, 2.0]]])
    assert hidden([ours], [theirs], [1], kind=NormalisedHiddenAlignment).tolist() == pytest.approx([2.0])
    mean = torch.full_like(theirs, 4.0)
    assert hidden([ours, mean], [theirs, theirs], [1, 2], kind=NormalisedHiddenAlignment).tolist() == [1.5]
    # the second position alone: 5 and 7 have variance 1
    mask = torch.tensor([[False, True]])
    assert hidden([ours], [theirs], [1], mask, NormalisedHiddenAlignment).tolist() == pytest.approx([10.0])
    assert hidden([theirs], [theirs], [1], kind=NormalisedHiddenAlignment).tolist() == [0.0]
    still = torch.ones(1, 2, 2)
    assert hidden([still], [still], [1], kind=NormalisedHiddenAlignment).tolist() == [0.0], "nothing to explain"


def test_normalised_distances_and_gradients_are_those_of_the_formula_whatever_the_size_of_the_states():
    torch.manual_seed(6)
    ours, theirs = torch.randn(3, 4, 5, requires_grad=True), 3 + 2 * torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    losses = hidden([ours], [theirs], [1], mask, NormalisedHiddenAlignment)
    reference = ours.detach().double().requires_grad_(True)
    expected = torch.stack(
        [
            (one[kept] - other[kept]).square().mean() / other[kept].var(correction=0)
            for one, other, kept in zip(reference, theirs.double(), mask, strict=True)
        ]
    )
    assert torch.allclose(losses.double(), expected, rtol=1e-5)
    found, right = torch.autograd.grad(losses.sum(), ours)[0], torch.autograd.grad(expected.sum(), reference)[0]
    assert (found.double() - right).abs().max() < 1e-5 * right.abs().max()
    larger = hidden([8 * ours], [8 * theirs], [1], mask, NormalisedHiddenAlignment)
    assert torch.allclose(larger, losses), "of another unit"
    rows = [slice(i, i + 1) for i in range(3)]
    alone = [hidden([ours[row]], [theirs[row]], [1], mask[row], NormalisedHiddenAlignment) for row in rows]
    assert torch.allclose(torch.cat(alone), losses), "of the sample, and not of the batch"


def test_a_number_of_layers_is_evenly_through_the_depth():
    """As many as there are blocks is what leaves each of them; of four blocks two are the second and the last."""
    for count, blocks, expected in ((4, 4, [1, 2, 3, 4]), (2, 4, [2, 4]), (1, 12, [12]), (12, 12, list(range(1, 13)))):
        wanted = NormalisedHiddenAlignment(count).hidden
        assert [state_number(number, blocks + 1) for number in wanted] == expected
    assert HiddenAlignment(3).layers == 3 and HiddenAlignment([3]).hidden == (3,)
    with pytest.raises(ConfigError, match="at least one hidden state"):
        HiddenAlignment(0)


def test_they_declare_what_they_need():
    assert LogitAlignment.taught and not LogitAlignment.labelled and LogitAlignment().hidden == ()
    assert HiddenAlignment([3, -1, 0.5]).hidden == (3, -1, 0.5) and HiddenAlignment([0]).taught


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_out_of_range_are_refused(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        LogitAlignment(temperature)


def test_no_layers_and_no_teacher_are_refused():
    with pytest.raises(ConfigError, match="layers"):
        HiddenAlignment([])
    for wrong in (1.5, -0.5, math.nan, math.inf):
        with pytest.raises(ConfigError, match="SummedHiddenAlignment: layers must be whole numbers, or shares"):
            SummedHiddenAlignment([1, wrong])
    for objective in (LogitAlignment(), HiddenAlignment([1])):
        with pytest.raises(DataError, match="no teacher"):
            objective(Output(torch.zeros(1, 2), Encoded(torch.zeros(1, 1))), Batch(torch.zeros(1, 1)))
