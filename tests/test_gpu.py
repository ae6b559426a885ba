"""One step on a GPU: the coefficients are where the trainer put them, in fp32, and the merge is the CPU's."""

import pytest
import torch

from adamerge.task_vectors.storage import Disk, LowBit, Pinned, Resident

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "storage", [Resident(), Resident("bfloat16"), Pinned(), Pinned("float16"), LowBit(8), Disk()], ids=str
)
def test_a_bf16_mixed_step_on_cuda(pool, image_folders, storage):
    from lightning import Trainer
    from modules import descending

    from adamerge import ImageCalibration, ImageTask
    from adamerge.backbones import OpenClipClassifier
    from adamerge.merging.merged_model import MergedModel
    from adamerge.objectives import Entropy
    from adamerge.parametrizations import LayerWise
    from adamerge.task_vectors.task_vectors import TaskVectors

    data = ImageCalibration(tasks={t: ImageTask(f, ["a {}"]) for t, f in image_folders.items()}, batch_size=4)
    vectors = TaskVectors(**pool)
    module = descending(OpenClipClassifier(pool["base"]), vectors, LayerWise, Entropy(), lr=0.05, storage=storage)
    devices = []
    step = module.training_step

    def watched(*arguments):
        loss = step(*arguments)
        devices.extend({tensor.device.type for tensor in module.merged.backbone.tensors().values()})
        assert module.merged.parametrization.w.device.type == loss.device.type == "cuda"
        return loss

    module.training_step = watched
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(
        max_steps=1, accelerator="gpu", devices=1, precision="bf16-mixed", limit_val_batches=0,
        use_distributed_sampler=False, **quiet,
    ).fit(module, data)  # fmt: skip
    assert set(devices) == {"cuda"}
    learned = module.merged.parametrization.w.detach()
    assert learned.dtype == torch.float32 and torch.isfinite(learned).all()
    assert (learned.cpu() - 0.3).abs().max() > 1e-2

    def merged_on(device: str) -> dict[str, torch.Tensor]:
        parametrization = LayerWise(vectors)
        with torch.no_grad():
            parametrization.w.copy_(learned.cpu())
        merged = MergedModel(OpenClipClassifier(pool["base"]), vectors, parametrization, storage).to(device)
        merged.merge()
        return {name: tensor.detach().cpu() for name, tensor in merged.backbone.tensors().items()}

    ours, theirs = merged_on("cuda"), merged_on("cpu")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("view", ["AffinePhotometric", "MixInputs", "FlipAndShift", "CropAndFlip"])
def test_a_view_on_cuda_is_the_cpus(view):
    """Numbers of samples are drawn on the host; pixels that are interpolated may be rounded the other way."""
    from adamerge import objectives
    from adamerge.objectives.views import seeds_of

    images = torch.randint(0, 256, (32, 3, 24, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds, kind = seeds_of(0, 3, torch.arange(32)), getattr(objectives, view)()
    here, there = kind(images, seeds), kind(images.cuda(), seeds)
    assert there.device.type == "cuda" and (here.int() - there.cpu().int()).abs().max() <= 1
    assert torch.equal(kind(images[5:9].cuda(), seeds[5:9]), there[5:9]) or view == "MixInputs"


@pytest.mark.parametrize("view", ["TokenDropout", "TokenMasking", "SpanCrop"])
def test_a_view_of_texts_on_cuda_is_the_cpus(view):
    from types import SimpleNamespace

    from adamerge import objectives
    from adamerge.backbones.inputs import TextPlace
    from adamerge.objectives.views import seeds_of

    place = TextPlace(("input_ids", "attention_mask"), (0, 1, 2), 3)
    kind = getattr(objectives, view)(0.4).of(SimpleNamespace(text_place=lambda: place))
    texts = {"input_ids": torch.arange(320).view(16, 20), "attention_mask": torch.ones(16, 20, dtype=torch.int64)}
    seeds = seeds_of(0, 3, torch.arange(16))
    here, there = kind(texts, seeds), kind({name: value.cuda() for name, value in texts.items()}, seeds)
    assert all(torch.equal(here[name], there[name].cpu()) for name in here)


def test_teachers_run_ahead_on_cuda_and_how_far_changes_no_bit():
    from functools import partial

    from modules import descending
    from toy_points import ToyClassifier, ToyPoints, fit_toy, vectors_of

    from adamerge import LayerWise, LogitAlignment, TeachersAhead
    from adamerge.objectives.views import View, numbers_on

    class Noise(View):
        def __call__(self, inputs, seeds):
            return inputs + numbers_on(inputs.device, seeds, 0)[:, None]

    found = []
    for every in (1, 3, 99):
        module = descending(
            ToyClassifier(), vectors_of(), partial(LayerWise, init=0.3), LogitAlignment(), 0.1, views=Noise(),
            teachers=TeachersAhead(every),
        )  # fmt: skip
        step = module.search.step

        def watched(one, batch, step=step):
            assert all(part.teacher.logits.device.type == "cuda" for part in batch.values())
            return step(one, batch)

        module.search.step = watched
        fit_toy(module, ToyPoints(), 7, accelerator="gpu", devices=1)
        found.append(module.merged.parametrization.w.detach().cpu())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (found[0] - 0.3).abs().max() > 0.01


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_texts_of_like_length_on_cuda(monkeypatch, micro_batch):
    """Samples are put in order on the device, and their teachers with them: the fit is that of one padded pass."""
    from functools import partial

    from modules import descending
    from toys import ToyLanguage, ToyTexts, toy_fit, toy_vectors

    from adamerge import HiddenAlignment, LayerWise, LogitAlignment, Sum, TeachersAhead
    from adamerge.objectives import Unchanged
    from adamerge.training import length_groups

    found = []
    for cost, size, device in ((1 << 30, None, "gpu"), (0, micro_batch, "gpu"), (0, micro_batch, "cpu")):
        monkeypatch.setattr(length_groups, "PASS", cost)
        monkeypatch.setattr(length_groups, "PASS_ON_CPU", cost)
        for teachers, views in ((None, None), (TeachersAhead(2), Unchanged())):
            module = descending(
                ToyLanguage(), toy_vectors(), partial(LayerWise, init=0.3), Sum([LogitAlignment(), HiddenAlignment([1])]),
                0.1, torch.optim.SGD, teachers=teachers, views=views, micro_batch=size,
            )  # fmt: skip
            toy_fit(module, ToyTexts(), 4, accelerator=device, devices=1)
            found.append(module.merged.parametrization.w.detach().cpu())
    assert all((other - found[0]).abs().max() <= 1e-4 for other in found[1:])
    assert (found[0] - 0.3).abs().max() > 1e-2


@pytest.mark.parametrize("storage", [Resident(), Resident("bfloat16"), Pinned(), LowBit(8), Disk()], ids=str)
@pytest.mark.parametrize("kind", ["ChunkWise", "RowColumnWise", "ElementWise", "ComponentWise", "RankMask"])
def test_many_coefficients_and_a_start_on_cuda(tmp_path, kind, storage):
    """Merge, gradient and start are the CPU's, of matrices and vectors, of chunks of one length and of unequal ones."""
    from component_files import OF_COMPONENTS, save_components
    from safetensors.torch import save_file
    from starts import save_start

    import adamerge
    from adamerge.merging.copies import Place
    from adamerge.merging.merged_tensor import updates
    from adamerge.merging.pullback import MergeGradients
    from adamerge.task_vectors.task_vectors import TaskVectors

    shapes = {"matrix": (96, 130), "conv": (8, 3, 4, 4), "vector": (101,), "number": ()}
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    experts = {str(k): tmp_path / f"{k}.safetensors" for k in range(5)}
    for path in experts.values():
        save_file({name: own + 0.1 * torch.randn_like(own) for name, own in base.items()}, path)
    deltas = {name: 0.1 * torch.randn_like(own) for name, own in base.items()}
    start = save_start(tmp_path / "start.safetensors", deltas, tmp_path / "base.safetensors")
    vectors = TaskVectors(tmp_path / "base.safetensors", experts, start=start)
    if kind in OF_COMPONENTS:
        components = save_components(tmp_path / "components.safetensors", vectors)
        vectors = TaskVectors(tmp_path / "base.safetensors", experts, start=start, components=components)
    arguments = {"ChunkWise": {"chunks": 48}, "RankMask": {"inner": adamerge.LayerWise, "keep": 0.5}}.get(kind, {})
    slopes, found = {name: torch.randn(shape) for name, shape in shapes.items()}, {}
    for device in ("cpu", "cuda"):
        placed = storage.place(vectors, torch.device(device))
        parametrization = getattr(adamerge, kind)(placed, **arguments)
        for value in parametrization.values().values():
            value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))
        parametrization.to(device)
        gradients, places, merged = MergeGradients(list(parametrization.parameters())), {}, {}
        for name in placed:
            pieces = updates(parametrization, name, placed[name], gradients=gradients, start=placed.start_deltas(name))
            merged[name] = torch.cat([update for _, update in pieces]).cpu()
            parameter = torch.nn.Parameter(torch.zeros(shapes[name], device=device))
            parameter.grad = slopes[name].to(device)
            places[name] = Place(parameter)
        found[device] = merged, [own.cpu() for own in gradients.gradients(places)]
    for name, own in found["cpu"][0].items():
        assert torch.allclose(found["cuda"][0][name], own, rtol=1e-5, atol=1e-6), name
    for one, other in zip(found["cuda"][1], found["cpu"][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_sharded_goes_to_the_device_unit_by_unit():
    from torch import nn

    from adamerge.merging.sharded_copy import ShardedCopy

    network = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), nn.BatchNorm1d(2))
    network[0].register_buffer("scale", torch.ones(1))
    network.extra = nn.Parameter(torch.ones(3))  # of no module that runs as one
    ShardedCopy().move(network, torch.device("cuda"))
    where = {name: tensor.device.type for name, tensor in network.state_dict().items()}
    assert {where[name] for name in ("0.0.weight", "0.0.bias", "1.weight", "1.bias")} == {"cpu"}
    assert {where[name] for name in ("extra", "0.scale", "1.running_mean", "1.num_batches_tracked")} == {"cuda"}


def test_a_solver_that_sees_inputs_on_cuda_gives_what_the_cpu_gives(tmp_path):
    from safetensors.torch import load_file
    from toy_points import ToyPoints
    from toy_residual import ToyResidual, vectors

    from adamerge.solvers import LeastSquares
    from adamerge.solvers.solving import write_task_vectors
    from adamerge.training.solver_inputs import SampledInputs

    found = {}
    for device in ("cuda", "cpu"):
        backbone, data = ToyResidual(), ToyPoints(rows=40)
        data.serve(backbone)
        inputs = SampledInputs(backbone, vectors(), data, samples=30, device=torch.device(device))
        write_task_vectors(tmp_path / device, LeastSquares(), vectors().to(device), recipe={}, inputs=inputs)
        assert {tensor.device.type for tensor in backbone.tensors().values()} == {device}
        found[device] = load_file(tmp_path / device)
    for name, value in found["cpu"].items():
        assert torch.allclose(found["cuda"][name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max())), name


@pytest.mark.parametrize("name", ["WeightedSum", "Wudi", "WudiDescent", "TSVM", "IsoC", "IsoCTS", "SpectralBound"])
def test_a_solver_on_cuda_gives_what_the_cpu_gives(name, pool):
    import adamerge
    from adamerge.solvers.solving import solved
    from adamerge.task_vectors.task_vectors import TaskVectors

    wrapped = {"SpectralBound": {"solver": adamerge.WeightedSum(1.0), "dense": 1e-3}}
    vectors, solver = TaskVectors(**pool), getattr(adamerge, name)(**wrapped.get(name, {}))
    for tensor in vectors:
        ((ours,), (theirs,)) = (list(solved(solver, tensor, own)) for own in (vectors.to("cuda"), vectors))
        assert ours.device.type == "cuda" and ours.dtype == torch.float32
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())), tensor


def test_a_step_is_chosen_without_labels_on_cuda():
    from functools import partial

    from modules import descending
    from toy_points import TASKS, ToyClassifier, ToyPoints, fit_toy, vectors_of

    from adamerge import CollapseGuard, Entropy, HighestAgreement, KeepBest, LayerWise

    module = descending(ToyClassifier(), vectors_of(), partial(LayerWise, init=0.6), Entropy(), 0.1)
    callbacks = [KeepBest(HighestAgreement(), every=4), CollapseGuard(every=8)]
    fit_toy(module, ToyPoints(rows=100, held_out=0.1), 24, accelerator="gpu", devices=1, callbacks=callbacks)
    chosen, first = module.coefficients().protocol["selection"], module.held_out.first
    assert chosen["looks"] == 7 and chosen["value"] >= sum(float(first.agreement[task].mean()) for task in TASKS) / 2
    assert all(own.device.type == "cpu" and own.mean() == 1 for own in module.held_out.experts.agreement.values())


def test_components_on_cuda_give_the_experts_again(pool):
    """Their order and rotation may be others than on a CPU: what they multiply to may not."""
    from adamerge.solvers import Components
    from adamerge.solvers.solving import solved
    from adamerge.task_vectors.task_vectors import TaskVectors

    vectors = TaskVectors(**pool)
    for name in vectors:
        made, taus = list(solved(Components(), name, vectors.to("cuda"))), vectors[name].dense()
        for own, tau in zip(made, taus, strict=True):
            assert own.device.type == "cuda" and own.dtype == torch.float32
            rows, factors = len(tau) if tau.dim() > 1 else 0, own.double().cpu()
            found = (factors[:rows] @ factors[rows:].t()).view(tau.shape) if rows else factors
            assert (found - tau.double()).norm() <= 1e-5 * tau.double().norm(), name
