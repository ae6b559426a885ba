"""Trust: who is trusted to be of which class, by hand and against the paper's words in a loop."""

import pytest
import torch

from adamerge.objectives import SurestOfAll, SurestOfPredicted


def predictions(samples: int, classes: int, seed: int) -> torch.Tensor:
    """Lopsided: some classes are hardly ever the most probable one."""
    logits = 2 * torch.randn(samples, classes, generator=torch.Generator().manual_seed(seed))
    return (logits + torch.arange(classes) / 2).softmax(-1)


def test_a_class_that_is_never_predicted_has_its_trusted_samples():
    """By p_0: 0, 1; by p_1: 2, 3; by p_2: 3, 1, of which 3 is surer of class 1, and 1 of class 0."""
    p = torch.tensor([[0.9, 0.08, 0.02], [0.6, 0.1, 0.3], [0.1, 0.85, 0.05], [0.1, 0.5, 0.4]])
    assert SurestOfAll()(p, 2).tolist() == [0, 0, 1, 1]
    assert SurestOfAll()(p, 1).tolist() == [0, -1, 1, 2], "3 is the first of class 2 alone"
    assert SurestOfPredicted()(p, 1).tolist() == [0, -1, 1, -1]


def test_of_equal_samples_the_first_are_taken():
    p = torch.tensor([[0.7, 0.3]] * 5)
    assert SurestOfAll()(p, 2).tolist() == [0, 0, -1, -1, -1]
    assert SurestOfPredicted()(p, 2).tolist() == [0, 0, -1, -1, -1]


@pytest.mark.parametrize("most", [1, 4, 10, 60])
def test_it_is_the_papers_choice(most):
    p = predictions(60, 6, most)
    expected = [-1] * 60
    for c in range(6):
        for i in sorted(range(60), key=lambda i: -float(p[i, c]))[:most]:
            if expected[i] < 0 or p[i, c] > p[i, expected[i]]:
                expected[i] = c
    assert SurestOfAll()(p, most).tolist() == expected
    if most == 60:
        assert expected == p.argmax(dim=1).tolist(), "all are trusted to be what they are predicted as"


@pytest.mark.parametrize("most", [1, 4, 60])
def test_of_the_predicted_each_class_has_its_own_and_no_more(most):
    p = predictions(60, 6, most)
    found, label = SurestOfPredicted()(p, most), p.argmax(dim=1)
    for c in range(6):
        own = [i for i in range(60) if label[i] == c]
        own.sort(key=lambda i: -float(p[i, c]))
        assert sorted(own[:most]) == (found == c).nonzero()[:, 0].tolist()
