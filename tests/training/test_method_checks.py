"""Parts of a method that do not go together are refused, by their settings alone."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from modules import bilevel, descending

from adamerge.backbones import OpenClipClassifier
from adamerge.errors import ConfigError
from adamerge.merging.copies import WholeCopy
from adamerge.objectives import Entropy, LogitAlignment, Objective
from adamerge.objectives.penalties import DistanceToInitial
from adamerge.parametrizations import Concrete, LayerWise
from adamerge.solvers import WeightedSum
from adamerge.solvers.solving import write_task_vectors
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.method_checks import FitSettings
from adamerge.training.teacher_cache import TeacherCache

from .test_descent import fitted, images, module_of, w


class Supervised(Objective):
    """Cross-entropy, which needs labels."""

    labelled = True

    def forward(self, output, batch):
        return torch.nn.functional.cross_entropy(output.logits.float(), batch.labels, reduction="none")


def test_labelled_objectives_and_unlabelled_data_are_refused_and_the_other_way_round(pool, image_folders):
    with pytest.raises(ConfigError, match="Supervised needs labels"):
        fitted(module_of(pool, objective=Supervised()), images(image_folders))
    with pytest.raises(ConfigError, match="Entropy must not see labels"):
        fitted(module_of(pool), images(image_folders, labelled=True))
    module = module_of(pool, objective=Supervised())
    fitted(module, images(image_folders, labelled=True))
    assert not torch.equal(w(module), torch.full_like(w(module), 0.3))
    assert "labelled" in module.coefficients().protocol["calibration_split"]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_round_coefficients_are_refused(precision, pool, image_folders):
    with pytest.raises(ConfigError, match=precision):
        fitted(module_of(pool), images(image_folders), precision=precision)


def test_an_expert_without_data_is_refused_and_data_without_an_expert_are_not(pool, image_folders):
    only = {"colours": image_folders["colours"]}
    with pytest.raises(ConfigError, match="shapes"):
        fitted(module_of(pool), images(only))
    one = {**pool, "experts": {"colours": pool["experts"]["colours"]}}
    fitted(module_of(one), images(image_folders))


def test_a_solvers_vector_is_an_expert_that_needs_no_data(pool, image_folders, tmp_path):
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
    file = tmp_path / "merged.safetensors"
    write_task_vectors(file, WeightedSum(), vectors, recipe={}, transforms=[], protocol={})
    more = {**pool, "experts": {**pool["experts"], "solved": str(file)}}
    module = module_of(more, objective=LogitAlignment(), teachers=TeacherCache())
    fitted(module, images(image_folders))
    assert module.merged.task_vectors.experts[-1] == "solved"
    moved = w(module) - 0.3
    assert moved[-1].abs().max() > 0 and torch.isfinite(moved).all()


@pytest.mark.parametrize("make", [descending, bilevel])
def test_clipping_and_penalties_are_for_searches_that_have_them(make, pool, image_folders):
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])

    def asking(clipped, **arguments):
        module = make(
            OpenClipClassifier(pool["base"]), vectors, partial(Concrete, inner=LayerWise), Entropy(), **arguments
        )
        module.preflight(images(image_folders), FitSettings(2, "32-true", clipped, validated=False))

    asking(clipped=False)
    refused = pytest.raises(ConfigError, match="trainer.gradient_clip_val is not for Bilevel")
    with refused if make is bilevel else nullcontext():
        asking(clipped=True)
    refused = pytest.raises(ConfigError, match="model.penalty: Bilevel minimises the objective alone")
    with refused if make is bilevel else nullcontext():
        asking(clipped=False, penalty=DistanceToInitial())


class Collective(WholeCopy):
    """Whose processes go through each pass together."""

    collective = True


def test_teachers_and_processes_that_wait_for_each_other_are_refused(pool, image_folders):
    module = module_of(pool, copy=Collective(), objective=LogitAlignment())
    with pytest.raises(ConfigError, match=r"other passes of the experts.*"):
        module.preflight(images(image_folders), FitSettings(1, "32-true", clipped=False, validated=False))
