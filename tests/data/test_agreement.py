"""Agreement with the experts: numbers by hand, the divergence in float64, and what is lost where few classes are kept."""

import math

import pytest
import torch

from adamerge.backbones import Encoded, Output, Teacher
from adamerge.data.agreement import Divergence, SameClass
from adamerge.data.metrics import Accuracy, TokenLoss


def output_of(logits, mask=None) -> Output:
    return Output(logits, Encoded(logits, mask=mask))


def test_the_likeliest_class_is_the_same_or_not():
    """Of the three samples the first and the last agree, whatever the labels are."""
    ours = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0], [0.0, 0.1, 0.2]])
    theirs = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 1.0], [-5.0, -6.0, -4.0]]).log_softmax(-1)
    assert SameClass()(output_of(ours), Teacher(theirs)).tolist() == [1.0, 0.0, 1.0]
    top, classes = theirs.topk(2)
    assert SameClass()(output_of(ours), Teacher(top, classes.int())).tolist() == [1.0, 0.0, 1.0]
    assert SameClass().left(0.3, 0.6) == 0.5 and SameClass().left(0.2, 0.0) == 1.0


def test_divergence_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = log 2 - log(3) / 2, a mean over the two positions that count of three."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    theirs, ours = torch.stack([p, p, p])[None], torch.stack([p, q, q + 3])[None]
    mask = torch.tensor([[True, True, False]])
    found = Divergence()(output_of(ours, mask), Teacher(theirs))
    assert found.item() == pytest.approx((math.log(2) - math.log(3) / 2) / 2, abs=1e-6)
    assert Divergence().left(1.5, 0.5) == pytest.approx(1 / math.e) and Divergence().left(0.5, 0.5) == 1.0


def test_one_class_alone_has_no_other():
    """A sample of all mass at one class, of 0 probability elsewhere: KL is minus the log of ours there."""
    theirs = torch.tensor([[0.0, -math.inf, -math.inf]])
    ours = torch.tensor([[0.0, 0.0, 0.0]])
    assert Divergence()(output_of(ours), Teacher(theirs)).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("top", [None, 3, 20])
def test_divergence_in_float64(top):
    """Of ``k`` classes and all others as one; never more than that of all, and the same for what predicts the same."""
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (2 * torch.randn(5, 7, 20, generator=generator) for _ in range(2))
    mask = torch.rand(5, 7, generator=generator) > 0.3
    p, q = (logits.double().softmax(-1) for logits in (theirs, ours))
    full = (p * (p.log() - q.log())).sum(-1)
    wanted, teacher = full, Teacher(theirs.log_softmax(-1))
    if top is not None:
        values, classes = theirs.log_softmax(-1).topk(top)
        teacher = Teacher(values, classes.int() if top < 20 else classes)
        kept = torch.zeros_like(p).scatter_(-1, classes, 1.0)
        lumped = [torch.cat([each * kept, (each * (1 - kept)).sum(-1, keepdim=True)], -1) for each in (p, q)]
        terms = lumped[0] * (lumped[0].clamp_min(1e-300).log() - lumped[1].clamp_min(1e-300).log())
        wanted = terms.sum(-1)
        assert (wanted <= full + 1e-12).all() and (top == 20 or (wanted < full - 1e-6).any())
    expected = (wanted * mask).sum(1) / mask.sum(1)
    found = Divergence()(output_of(ours, mask), teacher)
    # twenty probabilities and their logarithms, of which those below 1 lose their place behind the others' sum
    assert torch.allclose(found.double(), expected, rtol=0, atol=64 * torch.finfo(torch.float32).eps * 10)
    same = Divergence()(output_of(theirs, mask), teacher)
    assert same.abs().max() < 64 * torch.finfo(torch.float32).eps


def test_whoever_leaves_the_experts_classes_is_seen():
    """All mass goes to a class that is not among the expert's two likeliest; among these the odds stay."""
    theirs = torch.tensor([[3.0, 2.0, -4.0, -4.0]])
    values, classes = theirs.log_softmax(-1).topk(2)
    gone = theirs + torch.tensor([[0.0, 0.0, 30.0, 0.0]])
    found = Divergence()(output_of(gone), Teacher(values, classes.int()))
    p = theirs.double().softmax(-1)[0]
    q = gone.double().softmax(-1)[0]
    kept, ours = p[:2].sum(), q[:2].sum()
    wanted = (p[:2] * (p[:2].log() - q[:2].log())).sum() + (1 - kept) * ((1 - kept) / (1 - ours)).log()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5) and found.item() > 20


def test_whose_agreement_which_metric_is():
    assert isinstance(Accuracy().agreement, SameClass) and isinstance(TokenLoss().agreement, Divergence)
