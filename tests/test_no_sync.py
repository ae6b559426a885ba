"""No step of a search waits for its device: shown on torch's meta device, which computes shapes and has no number to give.

Whoever asks a tensor there for a number, for its elements that are not zero, or for a copy on the host, gets an error, as
does whoever does it in Lightning's part of a step. What such a device does not notice is watched for: copies TO it that the
host waits for. The first step may make such copies, of what it places on the device for good; later ones may not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch.loops.fit_loop
import pytest
import torch
from component_files import OF_COMPONENTS, with_components
from lightning import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from modules import bilevel, descending
from pico import TASKS, pico_pool
from test_matrix import ALONE, adapter_folder, open_clip_pool
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_points import QUIET, ToyClassifier, ToyPoints, vectors_of
from toys import ToyLanguage, ToyTexts, toy_vectors

from adamerge import objectives, parametrizations
from adamerge.backbones import Batch
from adamerge.backbones.inputs import TextPlace, stack
from adamerge.merging.block_copy import BlockCopy
from adamerge.objectives import Entropy, Objective, PseudoLabel
from adamerge.objectives.penalties import DistanceToInitial
from adamerge.objectives.views import numbers_on, seeds_of
from adamerge.parametrizations import Concrete, LayerWise, Parametrization, TaskWise, constraints
from adamerge.task_vectors.storage import Disk, LowBit, Resident, Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training import MergingModule, TeacherCache, Teachers, TeachersAhead, length_groups
from adamerge.training.collapse_guard import CollapseGuard
from adamerge.training.keep_best import KeepBest
from adamerge.training.objective_gradient import BatchObjective
from adamerge.training.selection import HighestAgreement

META = torch.device("meta")
STEPS = 4
aten = torch.ops.aten


class Waited(AssertionError):
    """A host would have waited here."""


class Watch(TorchDispatchMode):
    """Lets through what a host need not wait for, and what it may: a flag of a step that is over, labels at each new pass.

    Args:
        module: whose fit this is.

    Attributes:
        strict: whether copies to the device are looked at.
        flags: in which step each flag was read.
        passes: how often the host asked which samples are trusted.
    """

    def __init__(self, module: MergingModule) -> None:
        super().__init__()
        self.module, self.strict, self.settled = module, False, None
        self.flags: list[int] = []
        self.passes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0] is self.settled:
            self.flags.append(self.module.global_step)
            return False
        if func is aten._to_copy.default and args[0].device == META and any(args[0] is own for own in self.trusted()):
            self.passes += 1
            return torch.arange(args[0].numel()) % 4 - 1
        if self.strict and (why := _blocking(func, args, kwargs)):
            raise Waited(f"{func}: {why}")
        return func(*args, **kwargs)

    def trusted(self) -> list[Tensor]:
        objective = self.module.objective
        parts = objective.parts if isinstance(objective, objectives.Sum) else [objective]
        return [own for part in parts if isinstance(part, PseudoLabel) for own in part.buffers()]


class Literals(TorchFunctionMode):
    """Numbers of Python that become tensors on a device: copies that ``Watch`` does not see."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if (
            self.watch.strict
            and func in {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
            and found.device == META
        ):
            raise Waited(f"{func.__name__} copies {args[0]} to the device")
        return found


def _blocking(func: Any, args: Any, kwargs: Any) -> str | None:
    """Why a host would wait, of what the meta device does not refuse."""
    if func is aten._to_copy.default:
        target = kwargs.get("device") or args[0].device
        if args[0].device.type == "cpu" and target.type == "meta" and not kwargs.get("non_blocking"):
            return "a copy to the device that is not non_blocking"
    if func is aten.copy_.default and args[0].device.type == "meta" and args[1].device.type == "cpu":
        return None if args[2:] == (True,) or kwargs.get("non_blocking") else "a copy that is not non_blocking"
    if func in {aten.index.Tensor, aten.index_put_.default, aten.index_put.default} and args[0].device.type == "meta":
        given = [index for index in args[1] if index is not None]
        if any(index.device.type == "cpu" for index in given):
            return "places of the host in a tensor of the device"
        masked = any(index.dtype == torch.bool for index in given)
        if masked and func is not aten.index.Tensor and args[2].numel() > 1:
            return "as many elements as a mask says"
    return None


class Settled(Callback):
    """Tells the watch when the first step is over, and which flag a step left behind."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.steps = watch, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.watch.strict = batch_idx > 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert all(parameter.device == META for parameter in module.merged.trained())
        self.watch.settled = module.guard._flag
        self.steps += 1


class Nowhere(CPUAccelerator):
    """Lightning's own for a device of which it knows nothing."""

    def setup_device(self, device: torch.device) -> None:
        return


class Taught(TeacherCache):
    """Filled by a fit on the CPU: numbers that the meta device could not give."""

    def begin(self, merged: Any, *arguments: Any, **named: Any) -> None:
        if merged.device != META:
            super().begin(merged, *arguments, **named)


@pytest.fixture(autouse=True)
def _fit_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Lightning asks the device before the first step and after the last, and what torch's autocast lacks for it."""
    monkeypatch.setattr(lightning.pytorch.loops.fit_loop, "has_len_all_ranks", lambda *_, **__: True)
    monkeypatch.setattr(Trainer, "_teardown", lambda trainer: trainer._signal_connector.teardown())
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *args, **kw: nullcontext() if kind == "meta" else autocast(kind, *args, **kw)
    )
    dtype_of, enabled = torch.get_autocast_dtype, torch.is_autocast_enabled
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16 if kind == "meta" else dtype_of(kind))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and enabled(*kind))
    for number in ("PASSES", "PROBES"):  # of what comes before the first step
        monkeypatch.setattr(f"adamerge.training.held_coefficients.{number}", 1)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as on a real device
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def fit(
    make: Callable[[TeacherCache], MergingModule], data: Callable[..., Any] = ToyPoints, *callbacks: Callback
) -> Watch:
    """Some steps on meta, watched."""
    teachers = Taught()
    module = make(teachers)
    clip = {"gradient_clip_val": 1.0} if module.automatic_optimization else {}
    settings: dict[str, Any] = {**QUIET, "max_steps": STEPS, "max_epochs": 1, **clip}
    if module.objective is not None and module.objective.taught:
        Trainer(**settings).fit(module, data())
        module = make(teachers)
    del settings["accelerator"]
    watch = Watch(module)
    settled = Settled(watch)
    trainer = Trainer(
        **settings, strategy=SingleDeviceStrategy(META, accelerator=Nowhere()), callbacks=[settled, *callbacks]
    )
    with Literals(watch), watch:
        trainer.fit(module, data())
    assert settled.steps == STEPS
    assert watch.flags == list(range(1, STEPS + 1)), "each flag once, when its step is over"
    return watch


STORAGES = [Resident(), Resident("bfloat16"), LowBit(8), LowBit(4), Disk()]
ALLOCATION = {name: places for places, name in enumerate(vectors_of())}
PARTS: dict[str, Any] = {
    "TaskWise": TaskWise,
    "BlockWise": parametrizations.BlockWise,
    "LayerWise": LayerWise,
    "ChunkWise": partial(parametrizations.ChunkWise, chunks=3),
    "ImportanceChunkWise": partial(parametrizations.ImportanceChunkWise, allocation=ALLOCATION),
    "RandomPartition": partial(parametrizations.RandomPartition, parts=3),
    "RowColumnWise": parametrizations.RowColumnWise,
    "ElementWise": parametrizations.ElementWise,
    "ComponentWise": parametrizations.ComponentWise,
    "RankMask": partial(parametrizations.RankMask, inner=LayerWise, keep=0.5),
    "Concrete": partial(Concrete, inner=LayerWise),
    "Frozen": partial(Concrete, inner=partial(parametrizations.Frozen, inner=TaskWise)),
}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "Entropy": partial(Entropy, normalise=True),
    "CrossEntropy": objectives.CrossEntropy,
    "LogitAlignment": partial(objectives.LogitAlignment, 2.0),
    "HiddenAlignment": partial(objectives.HiddenAlignment, [0, -1]),
    "SummedHiddenAlignment": partial(objectives.SummedHiddenAlignment, [0, -1]),
    "NormalisedHiddenAlignment": partial(objectives.NormalisedHiddenAlignment, 2),
    "ExpertLabels": objectives.ExpertLabels,
    "WeightedByConfidence": lambda: objectives.WeightedByConfidence(objectives.LogitAlignment(), 0.5, 0.1),
    "WhereAgreed": lambda: objectives.WhereAgreed(objectives.ExpertLabels()),
    "MarginalEntropy": objectives.MarginalEntropy,
    "PseudoLabel": partial(PseudoLabel, strong=objectives.Unchanged()),
    "Sum": lambda: objectives.Sum([Entropy(), PseudoLabel(strong=objectives.Unchanged())], [1.0, 0.5]),
}


def search(
    part: Any,
    objective: Objective,
    storage: Storage,
    teachers: Teachers,
    vectors: TaskVectors | None = None,
    **more: Any,
) -> MergingModule:
    return descending(
        ToyClassifier(), vectors or vectors_of(), part, objective, storage=storage, teachers=teachers, micro_batch=3,
        penalty=DistanceToInitial(), **more,
    )  # fmt: skip


def masks(objective: Objective, storage: Storage, teachers: Teachers, **more: Any) -> MergingModule:
    part = partial(Concrete, inner=LayerWise)
    return bilevel(ToyClassifier(), vectors_of(), part, objective, storage=storage, teachers=teachers, **more)


PAIRS = [
    pytest.param(part, storage, marks=[] if place == 0 or (part == "LayerWise" and place > 2) else pytest.mark.slow)
    for place, storage in enumerate(STORAGES)
    for part in PARTS
]


@pytest.mark.parametrize(("part", "storage"), PAIRS, ids=str)
def test_every_parametrization_from_every_storage(part, storage, tmp_path):
    vectors = with_components(tmp_path / "c.safetensors", vectors_of()) if part in OF_COMPONENTS else vectors_of()
    fit(lambda teachers: search(PARTS[part], Entropy(), storage, teachers, vectors))


FIRST_STORAGE = [
    storage if place == 0 else pytest.param(storage, marks=pytest.mark.slow) for place, storage in enumerate(STORAGES)
]


@pytest.mark.parametrize("storage", FIRST_STORAGE, ids=str)
def test_the_search_for_masks_from_every_storage(storage):
    fit(lambda teachers: masks(Entropy(), storage, teachers))


def test_between_two_looks_nobody_who_chooses_or_guards_waits(monkeypatch):
    """A look itself waits: for figures, and for coefficients that are kept on the host."""
    for whole in (
        "collapse_guard.values_of",
        "held_out.HeldOut.look",
        "held_out.HeldOut.ask_experts",
        "keep_best.KeepBest._look",
    ):
        monkeypatch.setattr(f"adamerge.training.{whole}", lambda *_: {})
    callbacks = [KeepBest(HighestAgreement(), every=1000, patience=1), CollapseGuard(every=1000)]
    data = partial(ToyPoints, rows=100, held_out=0.1)
    fit(lambda teachers: search(LayerWise, Entropy(), Resident(), teachers), data, *callbacks)
    assert callbacks[1].state_dict()["steps"] == STEPS and callbacks[1].state_dict()["sums"]["one"].device == META


BOTH = [partial(search, LayerWise), pytest.param(masks, marks=pytest.mark.slow)]


@pytest.mark.parametrize("make", BOTH, ids=["adaptive", "bilevel"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "Hidden" not in name])
def test_every_objective(name, make):
    labelled = OBJECTIVES[name]().labelled
    watch = fit(
        lambda teachers: make(OBJECTIVES[name](), Resident(), teachers), partial(ToyPoints, rows=16, labelled=labelled)
    )
    # 8 of 16 samples of each of two tasks in a step: the third begins the second pass
    assert watch.passes == (4 if name in {"PseudoLabel", "Sum"} else 0)


@pytest.mark.parametrize(
    "name",
    [
        "Entropy",
        "LogitAlignment",
        "HiddenAlignment",
        "SummedHiddenAlignment",
        "NormalisedHiddenAlignment",
        "ExpertLabels",
    ],
)
@pytest.mark.parametrize("micro_batch", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_a_language_model_whose_positions_count_or_not(name, micro_batch):
    """Micro-batches are of samples of like length."""
    fit(
        lambda teachers: descending(
            ToyLanguage(), toy_vectors(), LayerWise, OBJECTIVES[name](), storage=Resident(), teachers=teachers,
            micro_batch=micro_batch,
        ),
        ToyTexts,
    )  # fmt: skip


def test_texts_whose_passes_are_cut_and_whose_teachers_have_run_ahead(monkeypatch):
    monkeypatch.setattr(length_groups, "PASS", 0)
    objective = objectives.Sum([objectives.LogitAlignment(), objectives.HiddenAlignment([1])])
    passes, groups = [], length_groups.grouped

    def counting(*given: Any) -> Any:
        found = groups(*given)
        passes.append((len(found.sizes), found.order is not None))
        return found

    monkeypatch.setattr("adamerge.training.objective_gradient.grouped", counting)
    fit(
        lambda _: descending(
            ToyLanguage(), toy_vectors(), LayerWise, objective, storage=Resident(), teachers=TeachersAhead(STEPS),
            views=objectives.Unchanged(),
        ),
        ToyTexts,
    )  # fmt: skip
    assert (max(size for size, _ in passes), any(moved for _, moved in passes)) > (2, False)


@pytest.mark.parametrize("storage", FIRST_STORAGE, ids=str)
def test_block_by_block(storage):
    """Made on meta from the start: a block that drops its weights cannot move there."""
    backbone = ToyLanguage()
    backbone.network.to(META)

    def part(vectors: TaskVectors) -> Parametrization:
        return LayerWise(vectors).to(META)

    fit(lambda _: descending(backbone, toy_vectors(), part, Entropy(), storage=storage, copy=BlockCopy()), ToyTexts)


@pytest.mark.parametrize(
    ("kind", "lora", "part", "storage"),
    [
        *((kind, False, "LayerWise", Resident()) for kind in ("open_clip", "vit", "resnet", "clip")),
        ("vit", True, "ChunkWise", Resident()),
        pytest.param("vit", True, "ChunkWise", Disk(), marks=pytest.mark.slow),
        *(pytest.param("vit", True, "LayerWise", storage, marks=pytest.mark.slow) for storage in (Resident(), Disk())),
    ],
)
def test_networks_of_images(kind, lora, part, storage, tmp_path):
    """Networks of texts ask, in transformers' own code, whether any position is padding; what is in ours is in the toy."""
    pool = open_clip_pool(tmp_path) if kind == "open_clip" else pico_pool(kind, tmp_path)
    experts = {task: adapter_folder(kind, pool, task, tmp_path / f"{task}-lora") for task in TASKS} if lora else {}
    vectors = TaskVectors(pool["base"], pool["experts"] | experts, include=pool["include"], exclude=pool["exclude"])
    module = descending(pool["backbone"](), vectors, PARTS[part], Entropy(), storage=storage)
    merged, backbone = module.merged, module.merged.backbone
    backbone.build_heads(TASKS, vectors.checkpoints)
    batch = {
        task: Batch(stack([backbone.preprocess(sample) for sample in samples]).to(META))
        for task, samples in pool["samples"].items()
    }
    merged.to(META)
    watch = Watch(module)
    with Literals(watch), watch:
        for step in range(2):
            watch.strict = step > 0
            merged.merge()
            losses = BatchObjective(merged, Entropy(), {}, None, ALONE).backward(batch).losses
            merged.pull_back(torch.stack(list(losses.values())).sum()).backward()


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Clamp", "Sigmoid")), "Projection", "Softmax"]
)
def test_every_constraint(kind):
    part = partial(LayerWise, init=None, constraint=getattr(constraints, kind)())
    fit(lambda teachers: search(part, Entropy(), Resident(), teachers))


@pytest.mark.parametrize(
    "view",
    [
        objectives.FlipAndShift(),
        objectives.CropAndFlip(),
        objectives.RandomOperations(),
        objectives.Unchanged(),
        objectives.AffinePhotometric(),
        objectives.MixInputs(),
        objectives.Composed([objectives.AffinePhotometric(), objectives.MixInputs()]),
    ],
    ids=lambda view: type(view).__name__,
)
def test_every_view(view):
    """Images on the device, seeds on the host: which operation a sample gets is known without asking."""
    images, seeds = torch.zeros(12, 3, 8, 8, dtype=torch.uint8, device=META), seeds_of(0, 3, torch.arange(12))
    watch = Watch(search(LayerWise, Entropy(), Resident(), Taught()))
    watch.strict = True
    with Literals(watch), watch:
        found = view(images, seeds)
    assert found.device == META and found.shape == images.shape


@pytest.mark.parametrize(
    "view",
    [objectives.TokenDropout(), objectives.TokenMasking(), objectives.SpanCrop()],
    ids=lambda view: type(view).__name__,
)
def test_every_view_of_texts(view):
    place = TextPlace(("input_ids", "attention_mask"), (1, 2), 3)
    view = view.of(SimpleNamespace(text_place=lambda: place))
    texts = {name: torch.zeros(12, 8, dtype=torch.int64, device=META) for name in place.along}
    view(texts, seeds_of(0, 3, torch.arange(12)))  # the ids of special tokens go to the device once
    watch = Watch(search(LayerWise, Entropy(), Resident(), Taught()))
    watch.strict = True
    with Literals(watch), watch:
        found = view(texts, seeds_of(0, 4, torch.arange(12)))
    assert all(value.device == META and value.shape == (12, 8) for value in found.values())


class Noise(objectives.View):
    """Points moved at random."""

    def __call__(self, inputs: Any, seeds: Tensor) -> Any:
        return inputs + numbers_on(inputs.device, seeds, 0)[:, None]


@pytest.mark.parametrize("make", [partial(search, LayerWise), masks], ids=["adaptive", "bilevel"])
def test_steps_whose_teachers_have_run_ahead(make):
    """Experts are read from files once in a span: here before the first step, and all steps are of one span."""
    module = None

    def ahead(_: TeacherCache) -> MergingModule:
        nonlocal module
        objective = objectives.Sum([objectives.LogitAlignment(), Entropy()])
        module = make(objective, Resident(), TeachersAhead(STEPS), views=Noise())
        return module

    fit(ahead)
    assert module is not None and module.teachers.report()["fills"] == len(module.merged.task_vectors.experts)


def test_all_parts_are_here():
    for module, kind, swept in ((parametrizations, Parametrization, PARTS), (objectives, Objective, OBJECTIVES)):
        parts = {name: getattr(module, name) for name in module.__all__}
        final = {
            n for n, p in parts.items() if inspect.isclass(p) and issubclass(p, kind) and not inspect.isabstract(p)
        }
        assert final - {"StartAlone"} == swept.keys(), "which has nothing to learn"


class Asking(Entropy):
    """Looks at the loss, as one does to see how it is going."""

    def forward(self, output: Any, batch: Any) -> Tensor:
        loss = super().forward(output, batch)
        self.last = self.ask(loss)
        return loss

    def __init__(self, ask: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.ask = ask


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda loss: loss.sum().item(), "item"),
        (lambda loss: bool((loss > 0).all()), "item"),
        (lambda loss: loss.detach().cpu(), "copy out"),
        (lambda loss: loss[loss > 0], "nonzero"),
        (lambda loss: loss.detach().masked_select(loss > 0), "masked_select"),
        (lambda loss: torch.equal(loss, loss), "equal"),
        (lambda loss: loss * torch.ones(len(loss)).to(loss.device), "not non_blocking"),
        (lambda loss: loss.detach().clone().copy_(torch.zeros(len(loss))), "not non_blocking"),
        (lambda loss: loss[torch.arange(len(loss))], "places of the host"),
        (lambda loss: loss * torch.tensor(2.0, device=loss.device), "copies 2.0"),
    ],
)
def test_whoever_makes_a_host_wait_is_found(ask, error):
    with pytest.raises((Waited, RuntimeError), match=error):
        fit(lambda teachers: search(LayerWise, Asking(ask), Resident(), teachers))
