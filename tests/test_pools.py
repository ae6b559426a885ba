"""The pools of the papers: complete, true to the architectures they name, and able to run on stand-ins of their shape."""

import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from pages import labels_of, one_line, section, section_of_pool
from running import LAYER_WISE, ROOT, command, without_pictures, write_yaml
from safetensors.torch import save_file
from stand_ins import bare_clip_expert, moved, noise_data, pico_clip, pico_clip_expert, pico_open_clip, read_pool
from transformers import CLIPVisionConfig, CLIPVisionModel

from adamerge.checkpoints.opening import open_checkpoint
from adamerge.data import load_vocabulary
from adamerge.task_vectors.task_vectors import TaskVectors

POOLS, SUITES = ROOT / "configs" / "pools", ROOT / "configs" / "tasks"
VISION = sorted(POOLS.glob("clip_vit_*.yaml"))
HUB = [path for path in VISION if path.stem.endswith("_hub")]
OPEN_CLIP = [path for path in VISION if path not in HUB]
LAYERS = {"b32": 12, "b16": 12, "l14": 24}
NAMES = {"b32": "ViT-B/32", "b16": "ViT-B/16", "l14": "ViT-L/14"}  # as the page has them
TENSORS = {"b32": (199, 152), "b16": (199, 152), "l14": (391, 296)}  # of a vision tower: transformers', open_clip's
COUNTS = {"hub": 20, "task_vectors": 8, "tall_masks": 20}


def architecture_of(path: Path) -> str:
    return path.stem.split("_")[2]


def family_of(path: Path) -> str:
    return path.stem.split("_", 3)[3]


def task_vectors_of(path: Path) -> dict:
    return read_pool(path)["model"]["task_vectors"]


def tasks_of(path: Path) -> dict:
    return read_pool(path)["data"]["init_args"]["tasks"]


def named(names: list[str], include: list[str]) -> list[str]:
    """The tensor names that a pool's ``include`` leaves."""
    return list(
        TaskVectors(
            {name: torch.zeros(1) for name in names}, {"a": dict.fromkeys(names, torch.ones(1))}, include=include
        )
    )


def test_every_architecture_with_every_family():
    assert {(architecture_of(path), family_of(path)) for path in VISION} == {(a, f) for a in LAYERS for f in COUNTS}


@pytest.mark.parametrize("path", VISION, ids=lambda path: path.stem)
def test_experts_and_tasks_agree(path):
    experts, tasks = task_vectors_of(path)["experts"], tasks_of(path)
    assert list(experts) == list(tasks) and len(tasks) == COUNTS[family_of(path)]
    assert len(set(experts.values())) == len(experts), "no expert twice"
    assert len({task["dataset"] for task in tasks.values()}) == len(tasks), "no data set twice"
    for task, source in tasks.items():
        assert source["vocabulary"].startswith(task)
        assert load_vocabulary(source["vocabulary"]).templates


@pytest.mark.parametrize("path", VISION, ids=lambda path: path.stem)
def test_what_is_said_of_a_pool_is_honest(path):
    """In its first lines and in its section of the page, whose published figures are the same."""
    labels, text = labels_of(path), one_line(section_of_pool(path))
    assert labels["EXPECT"].startswith("not run here. Published") and " %" in labels["EXPECT"]
    assert labels["RUN"].startswith(f"adamerge fit configs/pools/{path.name} ")
    assert "different checkpoints of the same base" in text and "never put them side by side" in text
    assert "on the inputs of the test sets" in text and "accuracies in %" in text
    (estimate,) = rows_of(text_of_table(path, "Estimated, **not measured**"), NAMES[architecture_of(path)])
    assert re.search(r"\d+ to \d+ minutes", estimate) and len(re.findall(r"\d GB|\d and \d+ GB", estimate)) == 2

    published = text_of_table(path, f"Published for `*_{family_of(path)}`")
    lines = [[cell.strip() for cell in line.split("|")] for line in published.splitlines() if line.startswith("|")]
    column = lines[0].index(NAMES[architecture_of(path)])
    told = " ".join([published.partition("|")[0], *(line[column] for line in lines)])
    figures = re.findall(r"\d+\.\d", labels["EXPECT"].replace(".yaml", ""))
    assert len(figures) >= 4 and set(figures) <= set(re.findall(r"\d+\.\d", told))


def text_of_table(path: Path, beginning: str) -> str:
    """What stands in a pool's section from these words on to the end of the next table."""
    _, opened, rest = section_of_pool(path).partition(f"\n{beginning}")
    assert opened, f"no {beginning}"
    before, table = rest.split("\n\n")[:2]
    assert table.startswith("|"), f"no table after {beginning}"
    return f"{before}\n\n{table}"


def rows_of(text: str, name: str) -> list[str]:
    """The rows of a table that are of this name."""
    return [line for line in text.splitlines() if line.startswith(f"| {name} |")]


def test_the_families_share_no_expert_and_no_architecture_does():
    experts = [expert for path in VISION for expert in task_vectors_of(path)["experts"].values()]
    assert len(set(experts)) == len(experts) == 3 * sum(COUNTS.values())


@pytest.mark.parametrize(("count", "before"), [(8, 0), (14, 8)])
def test_a_suite_is_the_beginning_of_every_pool(count, before):
    suite = yaml.safe_load((SUITES / f"vision_{count}.yaml").read_text())
    assert suite.keys() == {"tasks"} and len(suite["tasks"]) == count > before
    for path in VISION:
        assert set(suite["tasks"][: COUNTS[family_of(path)]]) == set(list(tasks_of(path))[:count])


@pytest.mark.parametrize("path", OPEN_CLIP, ids=lambda path: path.stem)
def test_include_takes_the_image_tower_of_the_real_open_clip_model(path):
    pool = read_pool(path)
    with torch.device("meta"):
        config = open_clip.get_model_config(pool["model"]["backbone"]["init_args"]["architecture"])
        names = list(
            open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"}).state_dict()
        )
    taken = named(names, pool["model"]["task_vectors"]["include"])
    assert len(taken) == TENSORS[architecture_of(path)][1]
    assert set(names) - set(taken) == {name for name in names if not name.startswith("visual.")}
    assert config["quick_gelu"], "OpenAI's weights"


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.stem)
def test_include_takes_the_vision_tower_of_the_hubs_models(path, tmp_path):
    base = pico_clip(tmp_path / "base", LAYERS[architecture_of(path)])
    expert = pico_clip_expert(tmp_path / "expert.safetensors", base, 1)
    bare = bare_clip_expert(tmp_path / "bare", base, 1)
    assert not any(name.startswith("vision_model.") for name in open_checkpoint(bare))
    include = task_vectors_of(path)["include"]
    vectors = TaskVectors(tmp_path / "base", {"a": expert}, include=include)
    same = TaskVectors(tmp_path / "base", {"a": bare}, include=include)
    assert list(same) == list(vectors)
    assert all(torch.equal(same[name].dense(), vectors[name].dense()) for name in vectors)
    assert same.checkpoints["a"].keys() == {*vectors}, "no head, no text, no second copy"
    assert len(vectors) == TENSORS[architecture_of(path)][0]
    assert all(name.startswith("vision_model.") for name in vectors)
    config = CLIPVisionConfig(num_hidden_layers=LAYERS[architecture_of(path)])
    with torch.device("meta"):
        real = CLIPVisionModel(config).state_dict()
    assert len(real) == len(vectors)


def pico(path: Path, folder: Path) -> dict:
    """The pool with pico stand-ins for what it would download, and nothing else changed."""
    pool = read_pool(path)
    backbone, vectors = pool["model"]["backbone"]["init_args"], pool["model"]["task_vectors"]
    tasks = pool["data"]["init_args"]["tasks"]
    if path in HUB:
        base = pico_clip(folder / "base", LAYERS[architecture_of(path)])
        experts = {  # saved by either version of transformers, and mixed
            task: bare_clip_expert(folder / task, base, seed)
            if seed % 2
            else pico_clip_expert(folder / f"{task}.safetensors", base, seed)
            for seed, task in enumerate(vectors["experts"])
        }
        backbone["model"] = str(folder / "base")
    else:
        pico_open_clip(folder / "base", backbone["architecture"])
        tensors = open_clip.create_model(f"local-dir:{folder / 'base'}").state_dict()
        experts = {}
        for seed, task in enumerate(vectors["experts"]):
            tower = {name: moved(t, seed) for name, t in tensors.items() if name.startswith("visual.")}
            save_file(tower, folder / f"{task}.safetensors")
            experts[task] = str(folder / f"{task}.safetensors")
        backbone["architecture"] = str(folder / "base")
    vectors |= {"base": str(folder / "base"), "experts": experts}
    for task, source in tasks.items():
        source["dataset"] = noise_data(folder / "data" / task, source)
    return pool


@pytest.mark.slow
@pytest.mark.parametrize("path", VISION, ids=lambda path: path.stem)
def test_a_pool_runs_on_stand_ins(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    pool = write_yaml(tmp_path / "pools" / path.name, pico(path, tmp_path / "pico"))
    words = ["--config", pool, "--config", LAYER_WISE, "--trainer.max_steps=1", "--trainer.enable_progress_bar=false"]
    outcome = command(capfd, "fit", *words, "--data.batch_size=2", "--id=a")
    assert outcome.code == 0, outcome.err[-3000:]
    run = tmp_path / "runs" / f"{path.stem}-adamerging_layer_wise" / "a"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"


@pytest.mark.parametrize(
    ("name", "width", "layers", "patch", "text_width", "joint"),
    [("b32", 768, 12, 32, 512, 512), ("b16", 768, 12, 16, 512, 512), ("l14", 1024, 24, 14, 768, 768)],
)
def test_the_papers_pickles_keep_as_many_entries_as_the_page_says(name, width, layers, patch, text_width, joint):
    """TIES there counts the text tower's remains; counted by hand from the architectures, not by our code."""
    stem = 3 * patch**2 * width + width + ((224 // patch) ** 2 + 1) * width + 2 * width
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 4 * width
    visual = stem + layers * block + 2 * width + width * joint
    # token and position embeddings, final norm, projection, temperature: all but the blocks
    remains = 49408 * text_width + 77 * text_width + 2 * text_width + text_width * joint + 1
    pool, anchor = POOLS / f"clip_vit_{name}_task_vectors.yaml", "ties-on-the-papers-pickles"
    assert f"docs/pools.md#{anchor}" in labels_of(pool)["DIFFERS"]
    text = section(ROOT / "docs" / "pools.md", anchor)
    (row,) = rows_of(text, NAMES[name])
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d+,\d{3},\d{3}", row)]
    assert numbers == [visual, remains]
    (keep,) = re.findall(rf"{pool.name} .*\n.*keep: (0\.\d+)", text)
    assert int(float(keep) * visual) == int((visual + remains) * 0.2), "the same number of entries survives"
    assert f"| {100 * float(keep):.2f} % |" in row
