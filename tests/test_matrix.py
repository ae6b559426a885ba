"""Every part with every other: parametrization x constraint x objective x backbone x dense or LoRA experts, at pico size.

The full product runs on the engine: a merge, a step's backward pass, a contraction. A pairwise covering set, in which each
two choices meet at least once, runs through the command line's ``fit`` and ``export``; ten of it in the fast tests.
"""

from __future__ import annotations

import inspect
import itertools
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from component_files import OF_COMPONENTS
from conftest import build_open_clip_folder
from pico import CAUSAL, KINDS, TASKS, TEXTS, VISION_LANGUAGE, pico_pool, pictures, pictures_of_sizes
from running import QUICK, command, without_pictures, write_yaml
from safetensors.torch import save_file
from torch import Tensor

from adamerge import objectives, parametrizations
from adamerge.artifacts.recipe import describe
from adamerge.backbones import IGNORED, Batch, OpenClipClassifier, Teacher
from adamerge.backbones.inputs import stack, stack_tensors
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import AdamergeError, ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Objective
from adamerge.parametrizations import Frozen, LayerWise, Parametrization, constraints
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.objective_gradient import BatchObjective

ALONE = SimpleNamespace(reduce=lambda totals, reduce_op: totals, world_size=1)
BACKBONES = ["open_clip", *KINDS]
EXPERTS = ["dense", "lora"]
CONSTRAINTS = ["Free", "Clamp", "Projection", "Sigmoid", "Softmax"]
INIT = {**dict.fromkeys(CONSTRAINTS, 0.3), "Softmax": None}
PARAMETRIZATIONS: dict[str, dict[str, Any]] = {
    "TaskWise": {}, "BlockWise": {}, "LayerWise": {}, "ChunkWise": {"chunks": 3}, "RandomPartition": {"parts": 3},
    "ImportanceChunkWise": {"budget": 1.5}, "Concrete": {}, "RowColumnWise": {}, "ElementWise": {},
    "ComponentWise": {}, "RankMask": {},
}  # fmt: skip
UNCONSTRAINED = {"RowColumnWise", "ElementWise", "ComponentWise"}
CONSTRAINED = [name for name in PARAMETRIZATIONS if name not in UNCONSTRAINED]
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "Entropy": objectives.Entropy,
    "CrossEntropy": objectives.CrossEntropy,
    "LogitAlignment": objectives.LogitAlignment,
    "MarginalEntropy": objectives.MarginalEntropy,
    "HiddenAlignment": partial(objectives.HiddenAlignment, [-1]),
    "SummedHiddenAlignment": partial(objectives.SummedHiddenAlignment, [-1]),
    "NormalisedHiddenAlignment": partial(objectives.NormalisedHiddenAlignment, [-1]),
    "ExpertLabels": objectives.ExpertLabels,
    "WeightedByConfidence": lambda: objectives.WeightedByConfidence(objectives.LogitAlignment(), 0.5, 0.01),
    "WhereAgreed": lambda: objectives.WhereAgreed(objectives.ExpertLabels()),
    "Sum": lambda: objectives.Sum([objectives.LogitAlignment(2.0), objectives.HiddenAlignment([0, 1])], [1.0, 0.5]),
    "PseudoLabel": partial(objectives.PseudoLabel, strong=objectives.Unchanged()),
}
OF_SAMPLES = {"PseudoLabel", "WeightedByConfidence", "WhereAgreed"}  # of one class each, and some of them alone
LANGUAGE = {*CAUSAL, "t5", "t5_untied", *VISION_LANGUAGE}
OF_IMAGES = {"open_clip", "vit", "resnet", "clip"}
RANK = 2


def legal(*choices: str) -> bool:
    """Whether choices of several axes go together.

    Factors are of matrices, and a ResNet has none but its head's; what chooses samples is of classes, not of positions; some
    parametrizations are free, and some are of factors alone, as LoRA has them, or a stage before.
    """
    lora_of_nothing = {"resnet", "lora"} <= set(choices)
    if OF_COMPONENTS & set(choices) and {"dense", "resnet"} & set(choices):
        return False
    if UNCONSTRAINED & set(choices) and {*CONSTRAINTS[1:]} & set(choices):
        return False
    return not lora_of_nothing and not (OF_SAMPLES & set(choices) and LANGUAGE & set(choices))


def those_of(names: Sequence[str], experts: str) -> list[str]:
    """Those of the parametrizations that take such experts."""
    return [name for name in names if legal(name, experts)]


def open_clip_pool(folder: Path) -> dict[str, Any]:
    base = build_open_clip_folder(folder / "base")
    experts = {}
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        moved = {n: value + 0.05 * torch.randn_like(value) for n, value in base.items() if n.startswith("visual.")}
        save_file(moved, folder / f"{task}.safetensors")
        experts[task] = str(folder / f"{task}.safetensors")
    return {
        "base": str(folder / "base"), "experts": experts, "include": ["visual.*"], "exclude": [],
        "backbone": lambda: OpenClipClassifier(str(folder / "base")),
        "samples": {"one": pictures(), "two": pictures(seed=1)},
    }  # fmt: skip


def adapter_folder(kind: str, pool: dict[str, Any], task: str, folder: Path) -> str:
    """A LoRA expert as peft writes it: factors of every linear layer that is merged, and the expert's own head."""
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"], exclude=pool["exclude"])
    generator = torch.Generator().manual_seed(list(TASKS).index(task))
    tensors, modules = {}, []
    for name in vectors:
        shape = vectors.shape(name)
        if (
            len(shape) != 2
            or not name.endswith(".weight")
            or "embed" in name
            or name.endswith(("shared.weight", "wte.weight"))
        ):
            continue
        module, rows, columns = name.removesuffix(".weight"), *(shape if kind != "gpt2" else reversed(shape))
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(rows, RANK, generator=generator)
        modules.append(module)
    expert = open_checkpoint(pool["experts"][task])
    heads = {name for name in expert if name.startswith("classifier.") or (kind == "bert_mlm" and ".pooler." in name)}
    tensors |= {f"base_model.model.{name}": expert[name].clone() for name in heads}
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": modules, "bias": "none",
        "fan_in_fan_out": kind == "gpt2", "base_model_name_or_path": pool["base"],
        "modules_to_save": sorted({name.rpartition(".")[0] for name in heads}) or None,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """The pool of a backbone with dense or LoRA experts, made once."""
    root, made = tmp_path_factory.mktemp("matrix"), {}

    def get(kind: str, experts: str) -> dict[str, Any]:
        if (kind, experts) not in made:
            if experts == "dense":
                place = root / kind
                made[kind, experts] = open_clip_pool(place) if kind == "open_clip" else pico_pool(kind, place)
            else:
                dense = get(kind, "dense")
                found = {task: adapter_folder(kind, dense, task, root / f"{kind}-lora" / task) for task in TASKS}
                made[kind, experts] = dense | {"experts": found}
        return made[kind, experts]

    return get


def vectors_of(pool: dict[str, Any]) -> TaskVectors:
    return TaskVectors(pool["base"], pool["experts"], include=pool["include"], exclude=pool["exclude"])


def parametrization_of(name: str, constraint: str, vectors: TaskVectors) -> Parametrization:
    arguments = {"constraint": getattr(constraints, constraint)(), "init": INIT[constraint]}
    if name == "Concrete":
        return parametrizations.Concrete(vectors, partial(LayerWise, **arguments))
    if name == "RankMask":
        return parametrizations.RankMask(vectors, partial(LayerWise, **arguments))
    if name in UNCONSTRAINED:
        del arguments["constraint"]
    if name == "ImportanceChunkWise":
        arguments["importance"] = {tensor: 1.0 + i % 3 for i, tensor in enumerate(vectors)}
    return getattr(parametrizations, name)(vectors, **arguments, **PARAMETRIZATIONS[name])


class Engine:
    """A backbone with its batches, labels and teachers; parametrizations come and go."""

    def __init__(self, kind: str, pool: dict[str, Any]) -> None:
        self.vectors, self.backbone = vectors_of(pool), pool["backbone"]()
        merged = self.merged(LayerWise(self.vectors))
        self.backbone.build_heads(TASKS, self.vectors.checkpoints)
        self.batch = {}
        for task, samples in pool["samples"].items():
            ready = [self.backbone.preprocess(sample) for sample in samples]
            if kind in LANGUAGE:
                labels = stack_tensors([self.backbone.labels(sample) for sample in ready], IGNORED)
            else:
                labels = torch.arange(len(ready)) % len(TASKS[task].classnames)
            merged.fill_expert(task)
            with torch.no_grad():
                output = self.backbone.output(merged(stack(ready), [-1]), task)
                both = self.backbone.output(merged(stack(ready), [0, 1]), task)
            indices = torch.arange(len(ready))
            self.batch[task] = Batch(stack(ready), labels, None, indices)
            self.teachers = getattr(self, "teachers", {}) | {task: (output, both)}
        self.samples = {task: len(samples) for task, samples in pool["samples"].items()}

    def merged(self, parametrization: Parametrization) -> MergedModel:
        return MergedModel(self.backbone, self.vectors, parametrization)

    def for_objective(self, objective: Objective) -> dict[str, Batch]:
        found = {}
        for task, batch in self.batch.items():
            output = self.teachers[task][0 if len(objective.hidden) < 2 else 1]
            teacher = Teacher(output.logits, None, output.encoded.hidden) if objective.taught else None
            found[task] = batch._replace(labels=batch.labels if objective.labelled else None, teacher=teacher)
        return found


def gradients(engine: Engine, parametrization: Parametrization, objective: Objective) -> list[Tensor]:
    merged = engine.merged(parametrization)
    merged.merge()
    losses = BatchObjective(merged, objective, {}, None, ALONE).backward(engine.for_objective(objective)).losses
    assert all(torch.isfinite(loss) for loss in losses.values())
    merged.pull_back(torch.stack(list(losses.values())).sum()).backward()
    return [parameter.grad for parameter in parametrization.parameters() if parameter.requires_grad]


def on_the_engine(engine: Engine, parts: Sequence[str], kinds: Sequence[str], wanted: Sequence[str]) -> int:
    done = 0
    for name, constraint, objective_name in itertools.product(parts, kinds, wanted):
        objective = OBJECTIVES[objective_name]()
        found = gradients(engine, parametrization_of(name, constraint, engine.vectors), objective)
        assert found and all(torch.isfinite(gradient).all() for gradient in found), (name, constraint, objective_name)
        assert any(gradient.abs().max() > 0 for gradient in found), (name, constraint, objective_name)
        done += 1
    return done


DIRECT = [
    name for name in OBJECTIVES if name not in OF_SAMPLES
]  # which need a fit's course or agree on none: by the CLI


@pytest.mark.slow
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_full_product_on_the_engine(pools, kind, experts):
    if not legal(kind, experts):
        with pytest.raises(AdamergeError, match="no tensor"):
            vectors_of(pools(kind, experts))
        return
    engine = Engine(kind, pools(kind, experts))
    free, bound = (those_of(names, experts) for names in (sorted(UNCONSTRAINED), CONSTRAINED))
    assert on_the_engine(engine, bound, CONSTRAINTS, DIRECT) == (8 if experts == "lora" else 7) * 5 * len(DIRECT)
    assert on_the_engine(engine, free, ["Free"], DIRECT) == (3 if experts == "lora" else 2) * len(DIRECT)


SOME = [
    *(("open_clip", "lora"), ("gpt2", "lora"), ("bert_mlm", "dense")),
    *(
        pytest.param(*one, marks=pytest.mark.slow)
        for one in (("qwen3_moe", "dense"), ("t5", "lora"), ("qwen2_vl", "dense"))
    ),
]


@pytest.mark.parametrize(("kind", "experts"), SOME)
def test_parts_on_the_engine(pools, kind, experts):
    engine = Engine(kind, pools(kind, experts))
    free, bound = (those_of(names, experts) for names in (sorted(UNCONSTRAINED), CONSTRAINED))
    assert on_the_engine(engine, bound, ["Sigmoid"], ["Entropy", "Sum"]) == (16 if experts == "lora" else 14)
    assert on_the_engine(engine, free, ["Free"], ["Entropy", "Sum"]) == (6 if experts == "lora" else 4)
    assert on_the_engine(engine, ["LayerWise"], CONSTRAINTS, DIRECT) == 5 * len(DIRECT) == 45


def test_the_matrix_has_all_parts_there_are():
    """A new part must be put into the matrix."""
    public = {name for name in parametrizations.__all__ if _final(getattr(parametrizations, name), Parametrization)}
    assert public - {"Frozen", "StartAlone"} == set(PARAMETRIZATIONS), "these have no gradient of their own"
    kinds = {name for name, part in vars(constraints).items() if _final(part, constraints.Constraint)}
    assert kinds - {"Interval"} == set(CONSTRAINTS)
    assert {name for name in objectives.__all__ if _final(getattr(objectives, name), Objective)} == set(OBJECTIVES)


def _final(part: object, kind: type) -> bool:
    return isinstance(part, type) and issubclass(part, kind) and not inspect.isabstract(part)


# what does not go together ------------------------------------------------------------------------------------------


def test_a_frozen_parametrization_has_nothing_to_learn(pools):
    vectors = vectors_of(pools("llama", "dense"))
    assert not [p for p in Frozen(vectors, LayerWise).parameters() if p.requires_grad]


def test_hidden_states_that_there_are_not_are_refused(pools):
    engine = Engine("llama", pools("llama", "dense"))
    objective = objectives.HiddenAlignment([99])
    with pytest.raises(ConfigError, match="there is no hidden state 99"):
        gradients(engine, LayerWise(engine.vectors), objective)


# through the command line -------------------------------------------------------------------------------------------

# of each family one; the full product above has them all
THROUGH_CLI = [
    "open_clip",
    "resnet",
    "vit",
    "clip",
    "sentence",
    "bert_mlm",
    "gpt2",
    "qwen2_tied",
    "qwen3_moe",
    "t5",
    "llava",
]
AXES = (list(PARAMETRIZATIONS), CONSTRAINTS, list(OBJECTIVES), THROUGH_CLI, EXPERTS)


def covering() -> list[tuple[str, ...]]:
    """Rows in which each two legal choices of two axes meet, chosen greedily and always the same way."""
    rows = [row for row in itertools.product(*AXES) if legal(*row)]
    bits: dict[tuple[Any, ...], int] = {}  # a pair's place in the bits of a number, which are fast to count
    pairs_of = {}
    for row in rows:
        pairs = [(i, row[i], j, row[j]) for i, j in itertools.combinations(range(5), 2)]
        pairs_of[row] = sum(1 << bits.setdefault(pair, len(bits)) for pair in pairs)
    missing, chosen = (1 << len(bits)) - 1, []
    random.Random(4).shuffle(rows)
    while missing:
        best = max(rows, key=lambda row: (pairs_of[row] & missing).bit_count())
        missing &= ~pairs_of[best]
        chosen.append(best)
    return chosen


COVERING = covering()


def data_config(kind: str, root: Path) -> dict[str, Any]:
    """Saved data sets of the samples' kind, a few rows each."""
    tasks: dict[str, Any] = {}
    for task, words in TASKS.items():
        names, place, rows = list(words.classnames), root / "data" / task, 12
        label = [i % len(names) for i in range(rows)]
        features = {"label": datasets.ClassLabel(names=names)}
        if kind in OF_IMAGES or kind in VISION_LANGUAGE:
            images = pictures_of_sizes() if kind in VISION_LANGUAGE else pictures()
            columns: dict[str, list[Any]] = {"image": [image for _ in range(4) for image in images]}
            features["image"] = datasets.Image()
        else:
            columns = {"text": [f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(rows)]}
            features["text"] = datasets.Value("string")
        if kind in VISION_LANGUAGE:
            columns |= {"question": ["what?"] * rows, "answer": ["abc"] * rows}
            features |= {"question": datasets.Value("string"), "answer": datasets.Value("string")}
        made = datasets.Dataset.from_dict(columns | {"label": label}, datasets.Features(features))
        datasets.DatasetDict(dict.fromkeys(("calibration", "validation", "test"), made)).save_to_disk(place)
        tasks[task] = {"dataset": str(place)}
        if kind in LANGUAGE:
            response = {"t5": "abc {text}", **dict.fromkeys(VISION_LANGUAGE, "{answer}")}.get(kind)
            tasks[task] |= {} if response is None else {"response": response}
        else:
            tasks[task] |= {"templates": list(words.templates)}
    families = {"ImageText": VISION_LANGUAGE, "Language": LANGUAGE, "Image": OF_IMAGES}
    family = next((name for name, kinds in families.items() if kind in kinds), "Text")
    return {"class_path": f"adamerge.{family}Calibration", "init_args": {"tasks": tasks, "batch_size": 2}}


CLASSES = {
    "open_clip": ("OpenClipClassifier", "architecture"), "vit": ("ImageClassifier", "model"),
    "resnet": ("ImageClassifier", "model"), "clip": ("ClipVisionClassifier", "model"),
    "bert_mlm": ("SequenceClassifier", "model"),
    "sentence": ("SentenceClassifier", "model"), "t5": ("Seq2Seq", "model"),
    **dict.fromkeys(CAUSAL, ("CausalLM", "model")), **dict.fromkeys(VISION_LANGUAGE, ("VisionLanguage", "model")),
}  # fmt: skip


def configs(row: tuple[str, ...], pool: dict[str, Any], root: Path) -> tuple[Path, Path]:
    name, constraint, objective, kind, _ = row
    class_path, argument = CLASSES[kind]
    backbone = {"class_path": f"adamerge.{class_path}", "init_args": {argument: pool["base"]}}
    vectors = {key: pool[key] for key in ("base", "experts", "include", "exclude")}
    data = data_config(kind, root)
    chosen = OBJECTIVES[objective]()
    data["init_args"]["labelled"] = chosen.labelled
    init: dict[str, Any] = {
        "init": INIT[constraint],
        "constraint": {"class_path": f"adamerge.{constraint}"},
    }
    if name in {"Concrete", "RankMask"}:
        init = {"inner": {"class_path": "adamerge.parametrizations.LayerWise", "init_args": init}}
    if name in UNCONSTRAINED:
        del init["constraint"]
    if name == "ImportanceChunkWise":
        numbers = {tensor: 1.0 + i % 3 for i, tensor in enumerate(vectors_of(pool))}
        init["importance"] = str(root / "importance.json")
        (root / "importance.json").write_text(json.dumps(numbers))
    parametrization = {"class_path": f"adamerge.{name}", "init_args": init | PARAMETRIZATIONS[name]}
    model = {"parametrization": parametrization, "objective": describe(chosen), "search": {"lr": 0.01}}
    pool_file = write_yaml(
        root / "pools" / "pool.yaml", {"model": {"backbone": backbone, "task_vectors": vectors}, "data": data}
    )
    return pool_file, write_yaml(root / "methods" / "method.yaml", {"model": model, "trainer": {"max_steps": 2}})


def fit_and_export(row: tuple[str, ...], pools: Any, root: Path, capfd: Any) -> None:
    pool = pools(row[3], row[4])
    pool_file, method = configs(row, pool, root)
    quick = [word for word in QUICK if "batch_size" not in word]
    words = ["--config", pool_file, "--config", method, *quick, "--runs", root / "runs", "--name", "m", "--id", "r"]
    done = command(capfd, "fit", *words)
    assert done.code == 0, (row, done.err[-3000:])
    run = root / "runs" / "m" / "r"
    done = command(capfd, "export", run / "coefficients.safetensors", root / "merged")
    assert done.code == 0, (row, done.err[-3000:])
    assert any(file.suffix == ".safetensors" for file in (root / "merged").iterdir())


def test_the_covering_set_is_small_and_complete():
    least = max(sum(itertools.starmap(legal, itertools.product(*axes))) for axes in itertools.combinations(AXES, 2))
    assert len(COVERING) <= 1.1 * least, "as many as two axes need alone, and a tenth"
    for i, j in itertools.combinations(range(5), 2):
        met = {(row[i], row[j]) for row in COVERING}
        assert met == {pair for pair in itertools.product(AXES[i], AXES[j]) if legal(*pair)}


def test_pseudo_labels_of_positions_are_refused_with_the_reason(pools, tmp_path, capfd):
    row = ("LayerWise", "Free", "PseudoLabel", "gpt2", "dense")
    pool_file, method = configs(row, pools("gpt2", "dense"), tmp_path)
    done = command(capfd, "fit", "--config", pool_file, "--config", method, *QUICK, "--runs", tmp_path / "runs")
    assert (
        done.code == 2 and "PseudoLabel cannot learn task 'one'" in done.error and "one class per sample" in done.error
    )


@pytest.mark.parametrize("row", COVERING[:6], ids="-".join)
def test_six_of_the_covering_set_through_the_command_line(row, pools, tmp_path, capfd, monkeypatch):
    without_pictures(monkeypatch)
    fit_and_export(row, pools, tmp_path, capfd)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("kind", ["qwen2_vl", pytest.param("internvl", marks=pytest.mark.slow)])
def test_images_in_pieces_through_the_command_line(kind, experts, pools, tmp_path, capfd, monkeypatch):
    without_pictures(monkeypatch)
    fit_and_export(("LayerWise", "Sigmoid", "Sum", kind, experts), pools, tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("row", COVERING[6:], ids="-".join)
def test_the_covering_set_through_the_command_line(row, pools, tmp_path, capfd, monkeypatch):
    without_pictures(monkeypatch)
    fit_and_export(row, pools, tmp_path, capfd)
