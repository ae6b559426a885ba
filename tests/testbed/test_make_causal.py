"""The script that makes the language models, at a few steps; and the shipped files: hashes, size, from_pretrained."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import adamerge.testbed
from adamerge.testbed import make_causal
from adamerge.testbed.causal_tasks import CAUSAL_TASKS, task_texts

SHIPPED = Path(adamerge.testbed.__file__).parent / "checkpoints" / "causal"
FOLDERS = ["base", *(f"experts/{name}" for name in CAUSAL_TASKS)]
TINY = make_causal.Recipe(
    vocabulary=300, hidden=16, layers=2, intermediate=24, batch=4, pretrain_steps=4, finetune_steps=3, evaluate_every=2
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Batches this small gain nothing from threads, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts():
    return {name: task_texts(CAUSAL_TASKS[name]) for name in ("markup", "romance")}


@pytest.fixture(scope="module")
def made(tmp_path_factory, texts):
    """Base and two experts of a few steps, written, and the token ids of ten validation chunks of each."""
    out = tmp_path_factory.mktemp("causal")
    tokenizer = make_causal.train_tokenizer(texts, TINY.vocabulary, bytes_per_task=3000)
    train = [make_causal.encode(tokenizer, splits["train"][:40]) for splits in texts.values()]
    ids = {name: make_causal.encode(tokenizer, splits["validation"][:10]) for name, splits in texts.items()}
    base = make_causal.pretrain(TINY, train, out)
    experts = {
        name: make_causal.finetune(TINY, base, name, rows, validation=ids[name], folder=out)
        for name, rows in zip(texts, train, strict=True)
    }
    make_causal.write(TINY, tokenizer, base, experts, out)
    return out, tokenizer, base, experts, ids, train


def test_the_tokenizer_is_lossless_and_begins_with_bos(made, texts):
    _, tokenizer, *_ = made
    for text in [*texts["romance"]["test"][:5], "日本語 \t {{{"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == make_causal.BOS and tokenizer.decode(ids[1:]) == text
    assert len(tokenizer) == TINY.vocabulary
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    rows = make_causal.encode(tokenizer, ["a", "a " * 500])
    assert rows.shape == (2, make_causal.MAX_TOKENS)
    assert rows[0].tolist() == tokenizer("a")["input_ids"] + [make_causal.PAD] * (rows.shape[1] - 2)


def test_the_loss_is_the_mean_negative_log_probability_of_every_token(made):
    """Row by row without padding, in float64 after the logits."""
    _, _, base, _, ids, _ = made
    model = make_causal.create_model(TINY)
    model.load_state_dict(base)
    total, count = 0.0, 0
    for row in ids["romance"]:
        row = row[row != make_causal.PAD]
        with torch.no_grad():
            logits = model.eval()(input_ids=row[None]).logits[0].double()
        for place in range(1, len(row)):
            total -= (logits[place - 1] - logits[place - 1].exp().sum().log())[row[place]].item()
            count += 1
    assert make_causal.held_out_loss(model, ids["romance"]) == pytest.approx(total / count, abs=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [make_causal.learning_rate(step, 1000, 2.0) for step in range(1001)]
    assert rates[0] == pytest.approx(2 / 50) and rates[24] == pytest.approx(1.0)
    assert rates[500] == pytest.approx(2 * 0.55) and rates[1000] == pytest.approx(0.2)
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_batches_have_as_many_rows_of_every_pool_and_depend_on_the_seed_alone():
    pools = [torch.full((5, 3), 7), torch.full((9, 4), 8)]
    batch = make_causal.draw(pools, 6, seed=1)
    assert batch.tolist() == [[7, 7, 7, make_causal.PAD]] * 3 + [[8] * 4] * 3
    wide = [torch.arange(100)[:, None]]
    assert torch.equal(make_causal.draw(wide, 8, 3), make_causal.draw(wide, 8, 3))
    assert not torch.equal(make_causal.draw(wide, 8, 3), make_causal.draw(wide, 8, 4))


def test_a_killed_run_ends_where_an_unbroken_one_does(made, tmp_path, monkeypatch):
    _, _, base, _, _, train = made
    recipe = replace(TINY, checkpoint_every=2)

    def killed(state, file):
        torch.save(state, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_causal, "save", killed)
        make_causal.pretrain(recipe, train, tmp_path)
    assert torch.load(tmp_path / "base.partial.pt", weights_only=True)["step"] == 2
    resumed = make_causal.pretrain(recipe, train, tmp_path)
    assert (tmp_path / "base.pt").is_file() and not (tmp_path / "base.partial.pt").exists()
    assert all(torch.equal(tensor, base[name]) for name, tensor in resumed.items())


def test_an_expert_moves_all_weights_and_is_the_best_on_validation(made, tmp_path, capsys):
    _, _, base, experts, ids, train = made
    assert all(not torch.equal(tensor, base[name]) for name, tensor in experts["markup"].items())
    again = make_causal.finetune(TINY, base, "markup", train[0], validation=ids["markup"], folder=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    losses = {line.split()[2].rstrip(":"): float(line.split()[-1]) for line in lines[:-1]}
    assert list(losses) == ["2", "3"] and lines[-1].endswith(f"step {min(losses, key=losses.get)}")
    model = make_causal.create_model(TINY)
    model.load_state_dict(again)
    assert make_causal.held_out_loss(model, ids["markup"]) == pytest.approx(min(losses.values()), abs=1e-4)


def test_what_is_written_is_read_back_as_rounded(made):
    out, tokenizer, base, experts, *_ = made
    read_tokenizer, read_base, read_experts = make_causal.read(out)
    assert read_tokenizer("déjà vu\n")["input_ids"] == tokenizer("déjà vu\n")["input_ids"]
    assert set(read_experts) == set(experts)
    for name, tensor in base.items():
        assert torch.equal(read_base[name], tensor.half().float())
    for name, tensor in experts["romance"].items():
        assert torch.equal(read_experts["romance"][name], tensor.half().float())


def test_results_by_hand(made, monkeypatch):
    """Half of both deltas on top of the base, and the averages of what was measured."""
    _, _, base, experts, ids, _ = made
    monkeypatch.setattr(make_causal, "LAMBDAS", (0.0, 0.5))
    results = make_causal.evaluate(TINY, base, experts, ids)
    model = make_causal.create_model(TINY)
    half = {
        key: 0.5 * experts["markup"][key] + 0.5 * experts["romance"][key] for key in base
    }  # 1/2 a + 1/2 b: base cancels
    losses = {}
    for label, state in {"base": base, "half": half, **experts}.items():
        model.load_state_dict(state)
        losses[label] = {name: make_causal.held_out_loss(model, rows) for name, rows in ids.items()}
    assert results["pretrained"] == losses["base"]
    best = min(("base", "half"), key=lambda label: sum(losses[label].values()))
    assert results["task_arithmetic"] == pytest.approx(losses[best], abs=1e-5)
    assert results["best_lambda"] == {"base": 0.0, "half": 0.5}[best]
    assert results["individual"] == {name: losses[name][name] for name in experts}
    assert results["experts_everywhere"]["romance"] == losses["romance"]
    for label, average in results["averages"].items():
        assert average == pytest.approx(sum(results[label].values()) / 2)


def test_the_shipped_hashes_match_and_the_files_are_small():
    lines = (SHIPPED / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [file for folder in FOLDERS for file in (SHIPPED / folder).iterdir()]
    assert {file.relative_to(SHIPPED).as_posix() for file in files} == set(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == digest, name
    assert sum(file.stat().st_size for file in files) <= 16_000_000


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_shipped_models_load_without_a_missing_key(folder):
    model, info = AutoModelForCausalLM.from_pretrained(SHIPPED / folder, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM) and model.dtype == torch.float16
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", CAUSAL_TASKS)
def test_the_shipped_tokenizer_makes_chunks_of_at_most_about_128_tokens(name):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "base")
    found = task_texts(CAUSAL_TASKS[name])["test"]
    lengths = [len(ids) for ids in tokenizer(found)["input_ids"]]
    assert sum(length <= make_causal.MAX_TOKENS for length in lengths) >= 0.95 * len(lengths)
    assert sum(lengths) / len(lengths) > 60 and max(lengths) <= tokenizer.model_max_length
    assert tokenizer.decode(tokenizer(found[0])["input_ids"][1:]) == found[0]


def test_the_shipped_figures_agree_with_each_other_and_with_the_claim():
    results = json.loads((SHIPPED / "results.json").read_text())
    for label in ("pretrained", "task_arithmetic", "individual"):
        assert set(results[label]) == set(CAUSAL_TASKS)
        assert results["averages"][label] == pytest.approx(sum(results[label].values()) / len(CAUSAL_TASKS))
    curve = {float(key): value for key, value in results["task_arithmetic_curve"].items()}
    assert list(curve) == list(make_causal.LAMBDAS) and min(curve, key=curve.get) == results["best_lambda"]
    assert curve[results["best_lambda"]] == pytest.approx(results["averages"]["task_arithmetic"], abs=1e-4)
    averages = results["averages"]
    assert averages["individual"] + 0.15 <= averages["task_arithmetic"] < averages["pretrained"]
    for name, row in results["experts_everywhere"].items():
        assert row[name] == results["individual"][name] < results["pretrained"][name]


def test_a_shipped_expert_is_better_on_its_domain_than_the_base_and_the_other_experts():
    """On twenty test chunks, whatever the versions of the packages are."""
    tokenizer, base, experts = make_causal.read(SHIPPED)
    model = make_causal.create_model(make_causal.Recipe())
    ids = make_causal.encode(tokenizer, task_texts(CAUSAL_TASKS["romance"])["test"][:20])
    losses = {}
    for label, state in {"base": base, **experts}.items():
        model.load_state_dict(state)
        losses[label] = make_causal.held_out_loss(model, ids)
    assert min(losses, key=losses.get) == "romance" and losses["romance"] < losses["base"] - 0.15
