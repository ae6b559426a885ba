"""Task vectors: which tensors are merged, which experts are refused and in which words."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file

from adamerge.checkpoints.lora import AdapterCheckpoint
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.deltas.groups import Whole
from adamerge.errors import CheckpointError, ConfigError
from adamerge.task_vectors.storage import Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Combine, Elementwise, Scale, Ties


def model(seed=0, **changed):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "a.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(4, generator=generator),
        "b.weight": torch.randn(2, 2, generator=generator),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }
    return {name: value for name, value in {**weights, **changed}.items() if value is not None}


def test_deltas_are_expert_minus_base_by_name():
    experts = {"one": model(1), "two": dict(reversed(model(2).items()))}
    vectors = TaskVectors(model(0), experts)
    assert list(vectors) == ["a.bias", "a.weight", "b.weight"] and len(vectors) == 3
    assert vectors.experts == ("one", "two")
    for name in vectors:
        expected = torch.stack([experts[task][name].double() - model(0)[name].double() for task in ("one", "two")])
        assert (vectors[name].dense().double() - expected).abs().max() < 1e-6
        assert vectors.shape(name) == model(0)[name].shape
    assert "a.weight" in vectors and "steps" not in vectors and "nowhere" not in vectors
    for name in ("steps", "nowhere"):
        with pytest.raises(KeyError):
            vectors[name]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], ["a.bias", "a.weight", "b.weight"]),
        (["a.*"], [], ["a.bias", "a.weight"]),
        (["*.weight"], ["b.*"], ["a.weight"]),
        (["a.*", "b.*"], ["*.bias"], ["a.weight", "b.weight"]),
        ([], ["?.bias"], ["a.weight", "b.weight"]),
        (["A.*", "a.bias"], [], ["a.bias"]),
    ],
)
def test_globs_select_and_are_case_sensitive(include, exclude, expected):
    assert list(TaskVectors(model(0), {"one": model(1)}, include=include, exclude=exclude)) == expected


def test_nothing_to_merge_and_no_experts_are_errors():
    with pytest.raises(ConfigError, match=r"leave no tensor"):
        TaskVectors(model(0), {"one": model(1)}, include=["nothing.*"])
    with pytest.raises(ConfigError, match="experts"):
        TaskVectors(model(0), {})


@settings(max_examples=15, deadline=None)
@given(some.sampled_from(["a.weight", "a.bias", "b.weight"]))
def test_any_missing_tensor_is_refused_by_name_and_may_be_excluded(name):
    expert = model(1, **{name: None})
    with pytest.raises(CheckpointError, match=rf"expert 'cars' lacks '{name}' \(base has 5 tensors, this one 4\)"):
        TaskVectors(model(0), {"dtd": model(2), "cars": expert})
    assert name not in TaskVectors(model(0), {"cars": expert}, exclude=[name])


def test_position_ids_that_old_versions_saved_are_no_extra_tensor():
    expert = model(1, position_ids=torch.arange(4))
    assert set(TaskVectors(model(0), {"cars": expert})) == set(TaskVectors(model(0), {"cars": model(1)}))


def test_an_extra_tensor_is_refused_by_name_and_may_be_excluded():
    expert = model(1, lost=torch.ones(2))
    with pytest.raises(CheckpointError, match="expert 'cars' has 1 tensors that the base lacks, first 'lost'"):
        TaskVectors(model(0), {"cars": expert})
    assert "lost" not in TaskVectors(model(0), {"cars": expert}, exclude=["lost"])


@settings(max_examples=25, deadline=None)
@given(some.lists(some.integers(1, 5), max_size=3).map(tuple).filter(lambda shape: shape != (4, 3)))
def test_any_other_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(CheckpointError) as found:
        TaskVectors(model(0), {"cars": model(1, **{"a.weight": torch.ones(shape)})})
    assert "expert 'cars': 'a.weight' has another shape" in found.value.what
    assert (found.value.expected, found.value.got) == ((4, 3), shape)


UNMERGEABLE = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", UNMERGEABLE, ids=str)
@pytest.mark.parametrize("who", ["base", "expert"])
def test_quantised_tensors_are_refused_by_name_and_may_be_excluded(dtype, who):
    odd = torch.ones(4, 3).to(dtype)
    base = model(0, **{"a.weight": odd}) if who == "base" else model(0)
    expert = model(1, **{"a.weight": odd}) if who == "expert" else model(1)
    message = f"{'the base' if who == 'base' else 'expert .cars.'}: 'a.weight' is {dtype}, which cannot be merged"
    with pytest.raises(CheckpointError, match=message):
        TaskVectors(base, {"cars": expert})
    assert list(TaskVectors(base, {"cars": expert}, exclude=["a.weight"])) == ["a.bias", "b.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_float_dtype_is_merged_in_fp32(dtype):
    expert = {n: v.to(dtype) if v.is_floating_point() else v for n, v in model(1).items()}
    vectors = TaskVectors(model(0), {"one": expert})
    found = vectors["a.weight"].dense()
    assert found.dtype == torch.float32
    exact = expert["a.weight"].double() - model(0)["a.weight"].double()
    assert (found[0].double() - exact).abs().max() < 4e-7


def test_check_names_twins_and_copies_of_the_base():
    TaskVectors(model(0), {"one": model(1), "two": model(2)}).check()
    with pytest.raises(CheckpointError, match=r"expert 'two' .* has the same weights as expert 'one'"):
        TaskVectors(model(0), {"one": model(1), "two": model(1)}).check()
    with pytest.raises(CheckpointError, match=r"expert 'one' .* has the same weights as the base"):
        TaskVectors(model(0), {"one": model(0), "two": model(1)}).check()


def test_check_compares_what_is_merged_not_what_else_is_in_the_files():
    """An expert file often holds less than its base (an image tower only): its coefficient is as unlearnable."""
    tower = {name: model(0)[name] for name in ("a.weight", "a.bias")}
    with pytest.raises(CheckpointError, match="same weights as the base"):
        TaskVectors(model(0), {"one": tower}, include=["a.*"]).check()
    longer = model(1)
    shorter = {name: model(1)[name] for name in ("a.weight", "a.bias")}
    with pytest.raises(CheckpointError, match="same weights as expert 'one'"):
        TaskVectors(model(0), {"one": longer, "two": shorter}, include=["a.*"]).check()


def test_check_names_non_finite_weights(tmp_path):
    bad = model(1)
    bad["a.bias"][2] = float("nan")
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"bad.safetensors.*NaN or Inf.*a\.bias"):
        TaskVectors(model(0), {"one": model(2), "two": tmp_path / "bad.safetensors"}).check()


class Doubled(Elementwise):
    """Twice the deltas, and a note of what it saw."""

    def prepare(self, vectors):
        return {"largest": [max(float(deltas.dense().abs().max()) for deltas in vectors.values())]}

    def apply(self, name, deltas, state):
        return 2 * deltas + 0 * state["largest"][0]


def test_transforms_apply_in_order_and_each_sees_what_the_one_before_made():
    first, second = Doubled(), Doubled()
    plain = TaskVectors(model(0), {"one": model(1), "two": model(2)})
    vectors = TaskVectors(model(0), {"one": model(1), "two": model(2)}, [first, second])
    largest = max(float(plain[name].dense().abs().max()) for name in plain)
    assert vectors.states[0]["largest"] == [largest]
    assert vectors.states[1]["largest"] == [2 * largest]
    for name in plain:
        assert torch.equal(vectors[name].dense(), 4 * plain[name].dense())


def test_given_states_are_used_and_nothing_is_learned_again():
    class Stubborn(Doubled):
        def prepare(self, vectors):
            raise AssertionError("its state was given")

    vectors = TaskVectors(model(0), {"one": model(1)}, [Stubborn()], states=[{"largest": [0.0]}])
    assert vectors["a.bias"].dense().shape == (1, 4)


@pytest.mark.parametrize("states", [[], [{"largest": [0.0]}] * 2], ids=["too few", "too many"])
def test_states_that_do_not_fit_the_transforms_are_refused(states):
    """Otherwise a damaged recipe merges untransformed task vectors without a word."""
    with pytest.raises((ConfigError, CheckpointError, ValueError)):
        TaskVectors(model(0), {"one": model(1)}, [Doubled()], states=states)["a.bias"].dense()


def test_resident_and_streamed_and_moved_are_the_same_numbers():
    transforms = [Ties(keep=0.5)]
    vectors = TaskVectors(model(0), {"one": model(1), "two": model(2)}, transforms)
    held, moved = Resident().place(vectors, torch.device("cpu")), vectors.to("cpu")
    for name in vectors:
        assert torch.equal(held[name].dense(), vectors[name].dense())
        assert torch.equal(moved[name].dense(), vectors[name].dense())
        assert torch.equal(held.base_tensor(name), model(0)[name])
        assert held[name].dense().dtype == torch.float32
    assert held.states == moved.states == vectors.states
    assert held["a.bias"].dense().data_ptr() != moved["a.bias"].dense().data_ptr()


def test_only_headers_are_read_before_a_tensor_is_asked_for(tmp_path, monkeypatch):
    from adamerge.io.safetensors_file import TensorFile

    paths = {}
    for seed, name in enumerate(("base", "one", "two")):
        save_file(model(seed), tmp_path / f"{name}.safetensors")
        paths[name] = tmp_path / f"{name}.safetensors"
    reads = []
    read = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, name: reads.append((self.path.stem, name)) or read(self, name))
    vectors = TaskVectors(paths.pop("base"), paths)
    assert "a.bias" in vectors and vectors.shape("a.weight") == (4, 3) and list(vectors) and reads == []
    vectors["a.bias"].dense()
    assert sorted(reads) == [("base", "a.bias"), ("one", "a.bias"), ("two", "a.bias")]


# LoRA experts ---------------------------------------------------------------------------------------------------------

LLAMA = ("llama", "llama patterns")


def lora_vectors(lora, cases=LLAMA, **arguments):
    kind = cases[0].split()[0]
    experts = {case: lora.adapters.get(case, lora.merged.get(case)) for case in cases}
    return TaskVectors(lora.bases[kind], experts, **arguments)


def exact_deltas(lora, cases, name):
    base = open_checkpoint(lora.bases[cases[0].split()[0]])
    return torch.stack([lora.merged[case][name].double() - base[name].double() for case in cases])


def test_only_what_some_adapter_touches_is_merged(lora):
    vectors = lora_vectors(lora)
    touched = {name for name in vectors.base if exact_deltas(lora, LLAMA, name).any()}
    assert set(vectors) == touched and len(touched) < len(vectors.base)
    with pytest.raises(ConfigError, match="leave no tensor"):
        lora_vectors(lora, include=["*norm*"])


@pytest.mark.parametrize(
    "cases", [LLAMA, ("bert", "bert patterns", "bert head"), ("gpt2", "gpt2 square")], ids="+".join
)
def test_deltas_of_adapters_are_those_of_the_merged_models(lora, cases):
    vectors = lora_vectors(lora, cases)
    held = Resident().place(vectors, torch.device("cpu"))
    for name in vectors:
        exact = exact_deltas(lora, cases, name)
        for deltas in (vectors[name], held[name]):
            assert (deltas.dense().double() - exact).abs().max() < 1e-6
            coefficients = torch.randn(len(cases), 1)
            combined = deltas.combine(coefficients, Whole()).double()
            assert (
                combined - (coefficients.double().view(-1, *[1] * (exact.dim() - 1)) * exact).sum(0)
            ).abs().max() < 1e-6


@pytest.mark.parametrize("transforms", [[], [Scale({"llama": -1.0})], [Ties(keep=0.5)]], ids=["none", "scale", "ties"])
def test_full_models_and_adapters_merge_in_one_pool(lora, tmp_path, transforms):
    torch.manual_seed(4)
    base = load_file(lora.bases["llama"] / "model.safetensors")
    full = {name: value + 0.05 * torch.randn_like(value) for name, value in base.items()}
    experts = {"full": full, "llama": lora.adapters["llama"], "again": {n: v + 1 for n, v in full.items()}}
    dense = {**experts, "llama": {name: lora.merged["llama"][name] for name in base}}
    mixed = TaskVectors(lora.bases["llama"], experts, transforms)
    same = TaskVectors(lora.bases["llama"], dense, transforms)
    held = Resident().place(mixed, torch.device("cpu"))
    assert set(mixed) == set(base)
    for name in mixed:
        # a threshold falls on one side or the other of a rounding, for a few entries
        close = torch.isclose(mixed[name].dense(), same[name].dense(), atol=1e-6)
        assert close.float().mean() >= (1.0 if not transforms or isinstance(transforms[0], Scale) else 0.98)
        assert torch.equal(held[name].dense(), mixed[name].dense())


def test_resident_adapters_take_the_memory_of_their_factors(tmp_path):
    """Rank 2 of 256 x 256: a 64th of the dense deltas."""
    width, rank, tasks = 256, 2, 4
    base = {"a.weight": torch.randn(width, width), "b.weight": torch.randn(width, width)}
    save_file(base, tmp_path / "base.safetensors")
    experts = {}
    for task in range(tasks):
        folder = tmp_path / f"task{task}"
        folder.mkdir()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "base_model_name_or_path": "base"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        factors = {}
        for name in ("a", "b"):
            factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, width)
            factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(width, rank)
        save_file(factors, folder / "adapter_model.safetensors")
        experts[f"task{task}"] = folder
    vectors = TaskVectors(tmp_path / "base.safetensors", experts, [Scale({"task1": -1.0})])
    held = Resident().place(vectors, torch.device("cpu"))
    alive = sum(factor.untyped_storage().nbytes() for name in held for factor in held[name].read())
    assert alive == 2 * tasks * 4 * 2 * width * rank  # tensors, tasks, bytes, factors
    coefficients = torch.randn(tasks, 1)
    for name in base:
        assert torch.equal(held[name].combine(coefficients, Whole()), vectors[name].combine(coefficients, Whole()))


def test_check_compares_adapters_by_their_factors(lora, monkeypatch):
    lora_vectors(lora).check()
    twice = TaskVectors(lora.bases["llama"], {"one": lora.adapters["llama"], "two": lora.adapters["llama"]})
    reads, read = [], AdapterCheckpoint.__getitem__
    monkeypatch.setattr(AdapterCheckpoint, "__getitem__", lambda self, name: reads.append(name) or read(self, name))
    with pytest.raises(CheckpointError, match=r"expert 'two' .* has the same weights as expert 'one'"):
        twice.check()
    assert len(reads) == 2  # each against the base, where one tensor tells; never against each other


def test_an_untrained_adapter_equals_its_base(lora, tmp_path):
    shutil.copytree(lora.adapters["llama"], tmp_path / "new")
    weights = {
        name: torch.zeros_like(value) if "lora_B" in name else value
        for name, value in load_file(tmp_path / "new" / "adapter_model.safetensors").items()
    }
    save_file(weights, tmp_path / "new" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="has the same weights as the base"):
        TaskVectors(lora.bases["llama"], {"new": tmp_path / "new", "old": lora.adapters["llama patterns"]}).check()


# fewer experts than checkpoints ---------------------------------------------------------------------------------------


def test_experts_are_named_after_the_transforms():
    given = {name: model(seed) for seed, name in enumerate("abc", start=1)}
    vectors = TaskVectors(
        model(0), given, [Scale({"a": 2.0}), Combine({"d": {"a": -1, "b": 1, "c": 1}}), Ties(keep=1.0)]
    )
    assert vectors.experts == ("d",) and list(vectors.checkpoints) == ["a", "b", "c"]
    plain = TaskVectors(model(0), given)
    for name in vectors:
        a, b, c = plain[name].dense().double()
        assert (vectors[name].dense().double() - (b + c - 2 * a)).abs().max() < 1e-6
    again = TaskVectors(model(0), given, vectors.transforms, states=vectors.states)
    assert torch.equal(again["a.bias"].dense(), vectors["a.bias"].dense())
    with pytest.raises(ConfigError, match="there is no expert 'a'"):
        TaskVectors(model(0), given, [Combine({"d": {"b": 1.0}}), Scale({"a": 2.0})])
