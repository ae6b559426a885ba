"""The pools of the papers, language: what ``include`` takes of the real architectures, and prompts made of real columns."""

import json
import re
from pathlib import Path

import pytest
import torch
from pages import labels_of, one_line, section_of_pool
from pico import DECODER as PICO_DECODER
from pico import internvl_pool, moved_expert, pictures_of_sizes, qwen2_vl_pool
from running import METHODS, ROOT, TASK_ARITHMETIC, command, without_pictures, write_yaml
from safetensors.torch import load_file
from stand_ins import moved, read_pool
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from adamerge.data import ImageTextTask, LanguageCalibration, LanguageTask, TextTask
from adamerge.task_vectors.task_vectors import TaskVectors

POOLS = ROOT / "configs" / "pools"
EXPERTS = {
    "flan_t5_base_glue_lora": 8,
    "flan_t5_large_glue_lora": 8,
    "flan_t5_base_glue": 8,
    "roberta_base_glue": 7,
    "mistral_7b": 3,
    "internvl2_5_1b": 5,
    "qwen2_vl_7b": 5,
}
# what the page on pools estimates for each
ESTIMATED = {
    "flan_t5_base_glue_lora": "base with LoRA 3 to 6 minutes and 4 GB of device memory",
    "flan_t5_large_glue_lora": "large with LoRA 10 to 20 minutes and 9 GB",
    "flan_t5_base_glue": "base with whole experts 5 to 10 minutes and 12 GB",
    "roberta_base_glue": "3 to 6 minutes, and 6 GB of device memory",
    "mistral_7b": "50 steps that learn, at 3 samples each, 15 to 30 minutes on one GPU of 80 GB",
    "internvl2_5_1b": "50 steps that learn 5 to 10 minutes on one recent data-centre GPU, and 12 GB of device memory",
    "qwen2_vl_7b": "50 steps that learn, at 5 samples each, 30 to 60 minutes on one GPU of 80 GB",
}
# columns of the data sets, as their cards say
GLUE = {
    "cola": {"sentence": "a", "label": 0},
    "mnli": {"premise": "a", "hypothesis": "b", "label": 2},
    "mrpc": {"sentence1": "a", "sentence2": "b", "label": 0},
    "qnli": {"question": "a", "sentence": "b", "label": 0},
    "qqp": {"question1": "a", "question2": "b", "label": 1},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 1},
    "sst2": {"sentence": "a", "label": 1},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 3.75},
}
MISTRAL = {
    "math": {"question": "a", "answer": "b"},
    "chat": {"prompt": "a", "prompt_id": "1", "messages": [], "category": "Chat"},
    "code": {"task_id": 1, "text": "a", "code": "b", "test_list": []},
}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
DECODER = SMALL | {"num_key_value_heads": 1}


def path_of(name: str) -> Path:
    return POOLS / f"{name}.yaml"


def tasks_of(name: str) -> dict:
    return read_pool(path_of(name))["data"]["init_args"]["tasks"]


def t5(layers: int) -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 50}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # as Flan-T5
    return T5ForConditionalGeneration(T5Config(**sizes, **gated, num_layers=layers, num_decoder_layers=layers))


def internvl() -> InternVLForConditionalGeneration:
    vision = SMALL | {"num_hidden_layers": 1, "image_size": [28, 28], "patch_size": [14, 14]}
    del vision["vocab_size"]
    text = DECODER | {"model_type": "qwen2", "num_hidden_layers": 24}
    return InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text))


def qwen2_vl() -> Qwen2VLForConditionalGeneration:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = Qwen2VLConfig(text_config=DECODER | {"num_hidden_layers": 28}, vision_config=vision)
    return Qwen2VLForConditionalGeneration(config)


# the network as deep as the real one, and how many tensors the papers merge of it
NETWORKS = {
    "flan_t5_base_glue_lora": (lambda: t5(12), 72),
    "flan_t5_large_glue_lora": (lambda: t5(24), 144),
    "flan_t5_base_glue": (lambda: t5(12), None),
    "roberta_base_glue": (lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, num_hidden_layers=12)), 197),
    "mistral_7b": (lambda: MistralForCausalLM(MistralConfig(**DECODER, num_hidden_layers=32)), 224),
    "internvl2_5_1b": (internvl, 168),
    "qwen2_vl_7b": (qwen2_vl, 196),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_and_tasks_agree(name):
    experts, tasks = read_pool(path_of(name))["model"]["task_vectors"]["experts"], tasks_of(name)
    assert list(experts) == list(tasks) and len(tasks) == EXPERTS[name]
    assert len(set(experts.values())) == len(experts)


@pytest.mark.parametrize("name", EXPERTS)
def test_what_is_said_of_a_pool_is_honest(name):
    """In its first lines and in its section of the page, whose published figures are the same."""
    labels, text = labels_of(path_of(name)), one_line(section_of_pool(path_of(name)))
    assert labels["EXPECT"].startswith("not run here. Published")
    assert labels["RUN"].startswith(f"adamerge fit configs/pools/{name}.yaml ")
    figure = r"\b\d\d\.\d+"
    assert set(re.findall(figure, labels["EXPECT"])) <= set(re.findall(figure, text))
    assert "%" in text and "ever beside figures" in text
    _, _, estimates = text.partition("Estimated, not measured")
    assert ESTIMATED[name] in estimates


@pytest.mark.parametrize("name", NETWORKS)
def test_include_takes_what_the_papers_merge(name, tmp_path):
    make, count = NETWORKS[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    given = read_pool(path_of(name))["model"]["task_vectors"]
    selection = {"include": given.get("include", ()), "exclude": given.get("exclude", ())}
    base = TaskVectors(tmp_path, {"a": tmp_path}).base
    everything = [name for name in base if base.dtype(name).is_floating_point]
    expert = {name: moved(base[name], 1) for name in everything}
    vectors = TaskVectors(tmp_path, {"a": expert}, **selection)
    assert len(vectors) == (len(everything) if count is None else count)
    if selection["include"] and name != "roberta_base_glue":
        assert all(name.endswith(("_proj.weight", ".q.weight", ".v.weight")) for name in vectors)


def test_internvls_experts_need_no_conversion(tmp_path):
    """In the published form, with code of its own, the language layers have the names that transformers writes."""
    internvl().save_pretrained(tmp_path)
    base = TaskVectors(tmp_path, {"a": tmp_path}).base
    layers = {name: moved(base[name], 1) for name in base if name.startswith("language_model.model.layers.")}
    published = layers | {"mlp1.0.weight": torch.zeros(4), "vision_model.embeddings.class_embedding": torch.zeros(4)}
    published |= {"language_model.lm_head.weight": torch.zeros(4, 4)}
    include = read_pool(path_of("internvl2_5_1b"))["model"]["task_vectors"]["include"]
    assert len(TaskVectors(tmp_path, {"a": published}, include=include)) == 168


@pytest.mark.parametrize("name", [name for name in EXPERTS if name.startswith("flan_t5")])
def test_prompts_are_made_of_glues_columns(name):
    for task, settings in tasks_of(name).items():
        assert settings["config"] == task and settings["dataset"] == "nyu-mll/glue"
        assert settings["test"] == ("validation_matched" if task == "mnli" else "validation")
        source = LanguageTask(**settings)
        assert set(source.fields()) <= GLUE[task].keys()
        sample = source.sample(GLUE[task])
        texts = [value for column, value in GLUE[task].items() if column != "label"]
        assert "{" not in sample["prompt"]
        assert all(f"'{text}'" in sample["prompt"] or f'"{text}"' in sample["prompt"] for text in texts)
    answers = {task: LanguageTask(**s).sample(GLUE[task])["response"] for task, s in tasks_of(name).items()}
    assert answers == {
        "cola": "unacceptable",
        "mnli": "contradiction",
        "mrpc": "no",
        "qnli": "yes",
        "qqp": "yes",
        "rte": "no",
        "sst2": "positive",
        "stsb": "3.8",
    }


@pytest.mark.parametrize("name", [name for name in EXPERTS if name.startswith("flan_t5")])
def test_answers_reach_no_unlabelled_calibration(name):
    """Not even those that are numbers."""
    tasks = {task: LanguageTask(**settings) for task, settings in tasks_of(name).items()}
    data = LanguageCalibration(tasks=tasks)
    assert all(isinstance(data.read(task, "calibration", GLUE[task]), str) for task in tasks)


def test_the_three_pools_of_flan_t5_have_the_same_data():
    assert tasks_of("flan_t5_base_glue") == tasks_of("flan_t5_base_glue_lora") == tasks_of("flan_t5_large_glue_lora")


def test_pairs_are_glues_columns():
    for task, settings in tasks_of("roberta_base_glue").items():
        assert settings["config"] == task and set(TextTask(**settings).inputs) | {"label"} == GLUE[task].keys()


def test_texts_are_made_of_the_columns_of_their_data_sets():
    samples = {
        task: LanguageTask(**settings).sample(MISTRAL[task]) for task, settings in tasks_of("mistral_7b").items()
    }
    assert samples["math"] == {"prompt": "Question: a\nAnswer:", "response": " b"}
    assert samples["chat"] == "a" and samples["code"] == {"prompt": "a\n", "response": "b"}


@pytest.mark.parametrize("name", ["internvl2_5_1b", "qwen2_vl_7b"])
def test_questions_are_read_from_expert_mergings_json(name):
    for settings in tasks_of(name).values():
        source = ImageTextTask(**settings)
        assert source.sample({"image": "i", "question": "q"}) == {"image": "i", "question": "q", "response": None}


def image_text_pool(name: str, folder: Path) -> dict:
    """The pool with pico stand-ins, as deep as the real language parts, for what it would download; else as it is."""
    pool = read_pool(path_of(name))
    make, layers = {"qwen2_vl_7b": (qwen2_vl_pool, 28), "internvl2_5_1b": (internvl_pool, 24)}[name]
    decoder = PICO_DECODER | {"num_hidden_layers": layers, "max_position_embeddings": 32768}
    base, vectors = make(folder / "pico", decoder=decoder)["base"], pool["model"]["task_vectors"]
    pool["model"]["backbone"]["init_args"]["model"] = vectors["base"] = base
    for seed, task in enumerate(vectors["experts"]):
        vectors["experts"][task] = moved_expert(Path(base), folder / task, seed)
        rows = []
        for i, picture in enumerate(pictures_of_sizes()):
            picture.save(folder / f"{task}{i}.png")
            rows.append({"image_path": f"{task}{i}.png", "question": f"what is {i}?", "response": ["a cat", ""][i % 2]})
        (folder / f"{task}.json").write_text(json.dumps(rows))
        pool["data"]["init_args"]["tasks"][task]["dataset"] = str(folder / f"{task}.json")
    return pool


@pytest.mark.slow
@pytest.mark.parametrize("method", [TASK_ARITHMETIC, METHODS / "expert_merging.yaml"], ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["internvl2_5_1b", "qwen2_vl_7b"])
def test_a_pool_of_images_and_text_runs_on_stand_ins(name, method, tmp_path, monkeypatch, capfd):
    """Through fit and export, as its header says, and back by transformers' own loader."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    pool = image_text_pool(name, tmp_path)
    file = write_yaml(tmp_path / "pools" / f"{name}.yaml", pool)
    teachers = ["--model.teachers=adamerge.TeacherFiles", "--model.teachers.init_args.top=16"]
    steps = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]
    learns = [] if method == TASK_ARITHMETIC else [*teachers, *steps]
    outcome = command(capfd, "fit", "--config", file, "--config", method, *learns, "--id=a")
    assert outcome.code == 0, outcome.err[-3000:]
    run = tmp_path / "runs" / f"{name}-{method.stem}" / "a"
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    outcome = command(capfd, "export", run / "coefficients.safetensors", tmp_path / "merged")
    assert outcome.code == 0, outcome.err[-3000:]

    base, merged = load_file(f"{pool['model']['task_vectors']['base']}/model.safetensors"), tmp_path / "merged"
    written = load_file(merged / "model.safetensors")
    assert written.keys() == base.keys()
    changed = [key for key, value in written.items() if not torch.equal(value, base[key])]
    assert len(changed) == NETWORKS[name][1] and all(key.endswith("_proj.weight") for key in changed)
    assert not [key for key in changed if "vis" in key], "the language part alone"
    _, information = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not any(information.values())
    assert (merged / "chat_template.jinja").is_file() and (merged / "processor_config.json").is_file()
