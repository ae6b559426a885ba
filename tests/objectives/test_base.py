"""An objective of one's own needs one method; samples weigh the same unless it says otherwise."""

import pytest
import torch

from adamerge.backbones import Batch, Encoded, Output
from adamerge.objectives import Objective


def test_weights_are_one_per_sample():
    class Sum(Objective):
        def forward(self, output, batch):
            return output.logits.sum(dim=-1)

    objective, batch = Sum(), Batch(torch.zeros(3, 2, dtype=torch.uint8))
    assert objective.labelled is False
    assert objective(Output(torch.ones(3, 4), Encoded(torch.ones(3, 1))), batch).tolist() == [4.0] * 3
    assert objective.weight(batch).tolist() == [1.0] * 3 and objective.weight(batch).dtype == torch.float32


def test_without_a_forward_there_is_no_objective():
    class Nothing(Objective):
        pass

    with pytest.raises(TypeError, match="forward"):
        Nothing()
