"""The script that makes the text testbed, at a few steps; and the shipped adapters: hashes, size, peft's own loading."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import adamerge.testbed
from adamerge.testbed import make_text
from adamerge.testbed.text_tasks import TEXT_TASKS, base_folder, task_texts

SHIPPED = Path(adamerge.testbed.__file__).parent / "checkpoints" / "text"
TINY = make_text.Recipe(steps=2, batch=4, checkpoint_every=1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Batches this small gain nothing from threads, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base():
    return make_text.load_base()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("text")
    make_text.finetune(TEXT_TASKS["symbols"], TINY, out)
    make_text.write_sums(out, (out / "experts").rglob("*.*"))
    return out


def test_a_trained_adapter_moved_and_is_half_precision(made):
    factors = load_file(made / "experts/symbols/adapter_model.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in factors.values())
    assert all(tensor.abs().max() > 0 for name, tensor in factors.items() if ".lora_B." in name)
    assert not list((made / "progress").glob("*.partial.pt"))


def test_a_finished_expert_is_not_trained_again(made):
    weights = made / "experts/symbols/adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    make_text.finetune(TEXT_TASKS["symbols"], TINY, made)
    assert weights.stat().st_mtime_ns == before


def test_a_killed_run_goes_on_from_its_partial_file(tmp_path, monkeypatch):
    def killed(state, file):
        torch.save(state, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_text, "save", killed)
        make_text.finetune(TEXT_TASKS["symbols"], replace(TINY, steps=3), tmp_path)
    partial_file = tmp_path / "progress/symbols.partial.pt"
    assert torch.load(partial_file, weights_only=True)["step"] == 1
    steps = []
    monkeypatch.setattr(make_text, "cosine", lambda step, recipe: steps.append(step) or 1.0)
    make_text.finetune(TEXT_TASKS["symbols"], replace(TINY, steps=3), tmp_path)
    assert steps == [1, 2] and not partial_file.exists()


def test_the_embedding_is_the_mean_over_tokens_that_are_no_padding(base):
    with torch.no_grad():
        both = make_text.embed(base, ["an arrow", "a much longer sentence that pads the other one"])
        tokens = make_text.tokenizer()("an arrow", return_tensors="pt")
        alone = base(**tokens).last_hidden_state[0].double().mean(0)
    assert torch.allclose(both[0].double(), alone / alone.norm(), atol=1e-5)
    assert torch.allclose(both.norm(dim=-1), torch.ones(2))


def test_the_head_is_the_normalised_mean_over_templates(base):
    task = TEXT_TASKS["symbols"]
    head = make_text.zero_shot_head(base, task)
    with torch.no_grad():
        prompts = make_text.embed(base, [template.format(task.classnames[3]) for template in task.templates]).double()
    mean = prompts.mean(0)
    assert head.shape == (len(task.classnames), 384)
    assert torch.allclose(head[3].double(), 20 * mean / mean.norm(), atol=1e-4)


def test_batches_are_balanced():
    stream = make_text.balanced_batches([0] * 90 + [1] * 9 + [2], 30, torch.Generator().manual_seed(0))
    for _ in range(3):
        batch = next(stream)
        assert [sum(low <= index < high for index in batch) for low, high in ((0, 90), (90, 99), (99, 100))] == [10] * 3


@pytest.mark.slow
def test_results_hold_the_three_averages_and_go_on(made, monkeypatch):
    monkeypatch.setattr(make_text, "LAMBDAS", (0.0, 0.5))
    results = make_text.evaluate(made, ["symbols"], split="validation")
    assert set(results["averages"]) == {"pretrained", "task_arithmetic", "individual"}
    assert results["averages"]["task_arithmetic"] >= results["averages"]["pretrained"]
    monkeypatch.setattr(make_text, "accuracy", lambda *arguments: pytest.fail("measured again"))
    assert make_text.evaluate(made, ["symbols"], split="validation") == results


def test_the_shipped_hashes_match_and_the_files_are_small():
    lines = (SHIPPED / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [file for file in (SHIPPED / "experts").rglob("*") if file.is_file()]
    assert {file.relative_to(SHIPPED).as_posix() for file in files} == set(sums)
    assert set(sums) == {
        f"experts/{task}/{file}" for task in TEXT_TASKS for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    for name, digest in sums.items():
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == digest, name
    assert sum(file.stat().st_size for file in files) <= 8_000_000


def test_the_shipped_adapters_differ_as_the_engine_must_cope_with():
    configs = {
        name: json.loads((SHIPPED / "experts" / name / "adapter_config.json").read_text()) for name in TEXT_TASKS
    }
    assert len({config["r"] for config in configs.values()}) >= 3
    assert any(config["use_rslora"] for config in configs.values())
    assert any(config["rank_pattern"] for config in configs.values())
    assert {config["base_model_name_or_path"] for config in configs.values()} == {make_text.BASE_NAME}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (place > 1)) for place, name in enumerate(TEXT_TASKS)]
)
def test_peft_loads_a_shipped_adapter_and_merges_it_as_we_do(name):
    base = make_text.load_base()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    deltas = make_text.read_delta(SHIPPED / "experts" / name)
    merged = peft.PeftModel.from_pretrained(base, str(SHIPPED / "experts" / name)).merge_and_unload().state_dict()
    assert len(deltas) == 36 and set(merged) == set(before)
    for key, tensor in merged.items():
        change = deltas.get(key, torch.zeros(()))
        assert torch.allclose(tensor, before[key] + change, atol=1e-6), key
        assert (key in deltas) == (not torch.equal(tensor, before[key])), key


def test_the_installed_base_is_the_one_the_experts_were_trained_from():
    shipped = json.loads((SHIPPED / "results.json").read_text())["base"]
    installed = hashlib.sha256((base_folder() / "model.safetensors").read_bytes()).hexdigest()
    assert shipped == {"name": make_text.BASE_NAME, "sha256": installed}


def test_the_shipped_figures_agree_with_each_other():
    results = json.loads((SHIPPED / "results.json").read_text())
    averages = results["averages"]
    for method in averages:
        assert set(results[method]) == set(TEXT_TASKS)
        assert averages[method] == pytest.approx(sum(results[method].values()) / len(TEXT_TASKS))
    curve = results["task_arithmetic_curve"]
    assert list(curve) == [f"{step / 20:.2f}" for step in range(21)]
    assert curve[f"{results['best_lambda']:.2f}"] == max(curve.values()) == round(averages["task_arithmetic"], 2)
    assert curve["0.00"] == round(averages["pretrained"], 2)
    assert averages["individual"] - averages["task_arithmetic"] >= 8
    assert averages["task_arithmetic"] - averages["pretrained"] >= 5


def test_a_shipped_expert_is_better_than_the_base_on_its_task(base):
    task = TEXT_TASKS["symbols"]
    head, data = make_text.zero_shot_head(base, task), task_texts(task)["validation"]
    pretrained = make_text.accuracy(base, head, *data)
    expert = make_text.load_base()
    deltas = make_text.read_delta(SHIPPED / "experts" / "symbols")
    expert.load_state_dict({key: tensor + deltas.get(key, 0) for key, tensor in base.state_dict().items()})
    assert make_text.accuracy(expert, head, *data) > pretrained + 10
