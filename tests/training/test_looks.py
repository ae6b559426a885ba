"""Looks: what a selection is given to judge a step by, with labels and without, and which data have nothing to look at."""

from functools import partial

import pytest
import torch
from lightning import Callback
from modules import descending
from toy_points import TASKS, ToyClassifier, ToyPoints, fit_toy, vectors_of

from adamerge.data.agreement import SameClass
from adamerge.errors import ConfigError
from adamerge.objectives import CrossEntropy, Entropy
from adamerge.parametrizations import LayerWise
from adamerge.training.looks import HeldOutLooks, ValidationLooks


class Looking(Callback):
    """Looks at a fit before its first step and after each."""

    def __init__(self, looks):
        self.seen, self.found, self.name = looks, [], ""

    def on_train_start(self, trainer, module):
        self.seen.begin(module)
        self.name = self.seen.name(module)
        self.found.append(self.seen.look(module))

    def on_train_batch_end(self, trainer, module, *rest):
        self.found.append(self.seen.look(module))


def looked(looks, data, objective, **arguments):
    looking = Looking(looks)
    module = descending(ToyClassifier(), vectors_of(), partial(LayerWise, init=0.3), objective, 0.1, **arguments)
    fit_toy(module, data, 2, callbacks=[looking])
    return module, looking


def test_without_labels_it_is_agreement_beside_that_of_the_first_step():
    module, looking = looked(HeldOutLooks(), ToyPoints(rows=100, held_out=0.1), Entropy(), task_weights={"two": 0.5})
    first, last = looking.found[0], looking.found[-1]
    assert looking.name == "held_out/agreement" and isinstance(last.metric, SameClass)
    assert first.lost == {"one": 0.0, "two": 0.0} and last.weights == {"two": 0.5}
    assert last.experts == {"one": 1.0, "two": 1.0} and last.base == {}
    for task in TASKS:
        assert last.scores[task] == module.held_out.look(module).agreement[task].double().mean()
        assert last.lost[task] == pytest.approx(1 - last.scores[task] / first.scores[task])


def test_with_labels_it_is_the_validation_score():
    _, looking = looked(ValidationLooks(), ToyPoints(labelled=True), CrossEntropy())
    assert looking.name == "validation/accuracy" and looking.seen.labelled and not HeldOutLooks.labelled
    assert looking.found[0].lost == {} and looking.found[0].base == looking.found[-1].base != {}
    went_on = ValidationLooks()
    went_on.load_state_dict(looking.seen.state_dict())
    went_on.begin(None)  # scores nothing again
    assert went_on.state_dict() == looking.seen.state_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (partial(ToyPoints), "none are held out"),
        (partial(ToyPoints, ("one", "two", "three"), held_out=0.1), "task 'three' has none of its own"),
    ],
)
def test_there_must_be_something_to_look_at(data, message):
    class Refusing(Callback):
        def setup(self, trainer, module, stage):
            HeldOutLooks().check(module, "Rule")

    module = descending(ToyClassifier(), vectors_of(), LayerWise, Entropy(), 0.1)
    with pytest.raises(ConfigError, match=f"^Rule chooses .*{message}"):
        fit_toy(module, data(), 1, callbacks=[Refusing()])
    assert torch.equal(module.merged.parametrization.w, torch.full_like(module.merged.parametrization.w, 0.3))
