"""Held coefficients: by name where the true gradient is 0, never where it is only small, and the same after a resume."""

from functools import partial

import pytest
import torch
from lightning import Trainer
from modules import descending
from pico import TASKS, pico_pool
from test_matrix import ALONE
from torch.optim import SGD, Adam, AdamW
from toy_points import QUIET, ToyClassifier, ToyPoints, vectors_of

from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.heatmap import draw_heatmap
from adamerge.artifacts.importance import importances
from adamerge.backbones import Batch
from adamerge.backbones.inputs import stack
from adamerge.errors import DivergedError
from adamerge.merging.block_copy import BlockCopy
from adamerge.objectives import Entropy
from adamerge.objectives.penalties import CoefficientNorm, DistanceToInitial
from adamerge.parametrizations import ChunkWise, Concrete, LayerWise, TaskWise
from adamerge.parametrizations.held_names import held_names
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.callbacks import RunawayGuard
from adamerge.training.held_coefficients import by_group, constant
from adamerge.training.objective_gradient import BatchObjective


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: a second thread only waits for a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return pico_pool("clip", tmp_path_factory.mktemp("clip"))


def found(pool, part=LayerWise, copy=None, change=None, loss=None, dtype="float32"):
    """What is held of a pool's coefficients, by name; and what each was before and after it was decided."""
    experts = {
        task: TaskVectors(pool["base"], {task: path}).checkpoints[task] for task, path in pool["experts"].items()
    }
    if change is not None:
        experts = {task: change(task, dict(expert), pool) for task, expert in experts.items()}
    vectors = TaskVectors(pool["base"], experts, include=pool["include"], exclude=pool["exclude"])
    merged = descending(pool["backbone"](dtype), vectors, part, Entropy(), copy=copy).merged
    backbone = merged.backbone
    backbone.build_heads(TASKS, vectors.checkpoints)
    batch = {
        task: Batch(stack([backbone.preprocess(sample) for sample in samples]))
        for task, samples in pool["samples"].items()
    }
    masks = {id(logits) for logits in merged.parametrization.masks().values()}
    learned = [parameter for parameter in merged.trained() if id(parameter) not in masks]
    before = [parameter.detach().clone() for parameter in learned]

    def run():
        BatchObjective(merged, Entropy(), {}, None, ALONE).backward(batch)
        if loss is not None:
            loss(merged).backward()

    held = constant(merged, run, learned, 0, ALONE)
    assert all(torch.equal(one, other) for one, other in zip(before, learned, strict=True)), "as they were"
    named = held_names(by_group(merged.parametrization, dict(zip(learned, held, strict=True))), vectors.experts)
    return named.get("held", {})


KEYS = [f"vision_model.encoder.layers.{n}.self_attn.k_proj.bias" for n in range(2)]


@pytest.mark.parametrize(
    ("part", "copy", "dtype"),
    [
        (LayerWise, None, "float32"),
        (LayerWise, BlockCopy(), "float32"),
        (LayerWise, None, "bfloat16"),
        (partial(Concrete, inner=LayerWise), None, "float32"),
    ],
)
def test_attentions_key_biases_are_held_and_nothing_else(clip, part, copy, dtype):
    assert found(clip, part, copy, dtype=dtype) == {key: [0] for key in KEYS}


def test_of_a_fused_bias_the_keys_third_is_no_coefficient_but_a_chunk_can_be(tmp_path):
    pool = pico_pool("gpt2", tmp_path)
    assert found(pool) == {}
    assert found(pool, partial(ChunkWise, chunks=3)) == {f"transformer.h.{n}.attn.c_attn.bias": [1] for n in range(2)}


def test_one_coefficient_for_all_is_not_held(clip):
    assert found(clip, TaskWise) == {}


def test_a_tensor_that_an_expert_left_alone_is_held_for_that_expert(clip):
    name = "vision_model.post_layernorm.weight"

    def change(task, expert, pool):
        return expert | ({name: TaskVectors(pool["base"], {task: expert}).base[name]} if task == "two" else {})

    assert found(clip, change=change) == {key: [0] for key in KEYS} | {name: {"two": [0]}}


@pytest.mark.parametrize("name", [KEYS[0], "vision_model.post_layernorm.weight"])
def test_a_task_vector_that_is_tiny_has_a_true_gradient_where_it_had_one(clip, name):
    """``<G, tau>`` is ten thousand times smaller, and so is its rounding."""

    def change(task, expert, pool):
        base = TaskVectors(pool["base"], {task: expert}).base[name]
        return expert | {name: base + 1e-4 * (expert[name] - base)}

    assert found(clip, change=change) == {key: [0] for key in KEYS}


def test_a_key_bias_that_matters_a_little_moves(clip):
    """A term of the loss as small as a millionth: above the rounding, far below every other gradient."""

    def loss(merged):
        return 1e-6 * merged.backbone.tensors()[KEYS[0]].sum()

    assert found(clip, loss=loss) == {KEYS[1]: [0]}


def test_where_the_objective_is_flat_nothing_is_held(clip):
    """All gradients are rounding: better walk than stand for good."""

    def change(task, expert, pool):
        return expert

    assert found(clip, change=change, loss=None) != {}
    vectors = TaskVectors(clip["base"], clip["experts"], include=clip["include"])
    merged = descending(clip["backbone"](), vectors, LayerWise, Entropy()).merged
    draws = torch.Generator().manual_seed(0)

    def run():
        for tensor in merged.backbone.network.parameters():
            if tensor.requires_grad:
                tensor.grad = 1e-9 * torch.randn(tensor.shape, generator=draws)

    (held,) = constant(merged, run, merged.trained(), 0, ALONE)
    assert not held.any()


# in a fit ---------------------------------------------------------------------------------------------------------


def fitted(steps=6, ckpt=None, left_alone="first.bias", **arguments):
    """A toy whose expert ``two`` left one tensor alone."""
    vectors = vectors_of()
    experts = {task: dict(checkpoint) for task, checkpoint in vectors.checkpoints.items()}
    experts["two"][left_alone] = vectors.base[left_alone]
    module = descending(
        ToyClassifier(), TaskVectors(dict(vectors.base), experts), LayerWise, Entropy(), lr=0.05, **arguments
    )
    trainer = Trainer(max_steps=steps, max_epochs=-1, **QUIET)
    trainer.fit(module, ToyPoints(), ckpt_path=ckpt, weights_only=True)
    return module, trainer


@pytest.mark.parametrize(
    "optimizer", [Adam, partial(AdamW, weight_decay=0.5), partial(SGD, momentum=0.9, weight_decay=0.5)]
)
def test_what_is_held_keeps_its_bits_whatever_the_optimiser_and_the_penalty_want(optimizer):
    module, _ = fitted(optimizer=optimizer, penalty=CoefficientNorm(0.5))
    values = module.merged.parametrization.values()
    for name, value in values.items():
        moved = value != torch.tensor(0.3)
        assert moved.tolist() == [[True], [name != "first.bias"]], name
    assert module.coefficients().protocol["held"] == {"first.bias": {"two": [0]}}
    assert module.coefficients().held_table()["first.bias"] == ["two"]


def test_nothing_is_held_where_that_is_not_wanted():
    module, _ = fitted(penalty=CoefficientNorm(0.5), hold=False)
    assert module.merged.parametrization.values()["first.bias"][1] != 0.3
    assert "held" not in module.coefficients().protocol


def test_a_resumed_run_holds_what_the_run_held_and_decides_nothing(tmp_path, monkeypatch):
    whole, _ = fitted(6, optimizer=partial(AdamW, weight_decay=0.5))
    _, trainer = fitted(3, optimizer=partial(AdamW, weight_decay=0.5))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    monkeypatch.setattr("adamerge.training.held_coefficients.constant", lambda *arguments: pytest.fail("decided again"))
    resumed, _ = fitted(6, tmp_path / "half.ckpt", optimizer=partial(AdamW, weight_decay=0.5))
    assert torch.equal(resumed.merged.parametrization.w, whole.merged.parametrization.w)
    assert resumed.coefficients().protocol["held"] == {"first.bias": {"two": [0]}}
    # a run of a version that held nothing
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)
    del state["held"]
    torch.save(state, tmp_path / "old.ckpt")
    old, _ = fitted(6, tmp_path / "old.ckpt", optimizer=partial(AdamW, weight_decay=0.5))
    assert "held" not in old.coefficients().protocol


def test_penalties_count_what_is_learned():
    made = LayerWise(vectors_of())
    with torch.no_grad():
        made.w.copy_(torch.arange(8.0).view(2, 4))
    names = list(made.coefficients())
    made.hold({name: torch.tensor([[False], [column != 1]]) for column, name in enumerate(names)})
    # learned: 0 1 2 3 of the one expert, 5 of the other
    learned = torch.tensor([0.0, 1, 2, 3, 5])
    assert DistanceToInitial(2.0)(made).item() == pytest.approx(2 * float((learned - 0.3).abs().mean()), rel=1e-6)
    assert CoefficientNorm(2.0, order=2)(made).item() == pytest.approx(2 * (0 + 26**0.5 + 2 + 3) / 4, rel=1e-6)
    made.hold({name: torch.tensor([[column == 0]] * 2) for column, name in enumerate(names)})
    assert CoefficientNorm(2.0)(made).item() == pytest.approx(2 * (1 + 5 + 2 + 6 + 3 + 7) / 3, rel=1e-6)


def test_heat_map_importances_and_runaway_guard_see_what_is_learned(tmp_path):
    vectors = vectors_of()
    made = LayerWise(vectors)
    names = list(made.coefficients())
    held = {name: torch.tensor([[column == 0], [column == 0]]) for column, name in enumerate(names)}
    with torch.no_grad():
        made.w[:, 0] = 1000.0  # such as a file that a fit began from may say
    made.hold(held)
    coefficients = Coefficients(vectors, made, protocol=held_names(held, vectors.experts))
    found = importances(coefficients)
    assert found[names[0]] == 0 and all(found[name] > 0 for name in names[1:])
    draw_heatmap(coefficients.table(), tmp_path / "grey.png", held=coefficients.held_table())
    draw_heatmap(coefficients.table(), tmp_path / "plain.png")
    assert (tmp_path / "grey.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    module = descending(ToyClassifier(), vectors, LayerWise, Entropy())
    module.merged.parametrization = made
    RunawayGuard()._look(1, module)
    made.hold({})
    with pytest.raises(DivergedError, match="ran away"):
        RunawayGuard()._look(1, module)
