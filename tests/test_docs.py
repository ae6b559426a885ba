"""What is written for people: the pages' commands, code and links work, and the configurations open in one form."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from pages import anchor_of, header, labels_of
from running import (
    LAYER_WISE,
    METHODS,
    ROOT,
    TASK_ARITHMETIC,
    command,
    import_anew,
    pool_config,
    without_pictures,
    write_yaml,
)
from safetensors.torch import load_file

from adamerge.errors import AdamergeError
from adamerge.runs import parser
from adamerge.runs.command_line import Words, told_apart
from adamerge.runs.comparison_rows import rows_of
from adamerge.runs.configuration import configurations
from adamerge.runs.verbs import compare_parsers

CONFIGS, README = ROOT / "configs", ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
POOLS = {kind: CONFIGS / f"pools/testbed_{kind}.yaml" for kind in ("images", "text", "causal")}
BUNDLED = {str(path.relative_to(ROOT)) for path in POOLS.values()}
VERBS = {"fit", "check", "compare", "test", "inspect", "export"}
DOWNLOAD = "a download"  # what a block may need that no test has


# --- blocks of code ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> Iterator[Block]:
    """The fenced blocks, with what an HTML comment in front of one says that it needs."""
    lines = text.splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith("```")]
    for start, end in zip(starts[::2], starts[1::2], strict=True):
        before = re.fullmatch(r"<!-- needs: (.+) -->", lines[start - 1])
        content = "\n".join(lines[start + 1 : end])
        yield Block(page, start + 1, lines[start][3:].strip(), content, before[1] if before else None)


BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(), page.relative_to(ROOT).as_posix())]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every command, as bash expands them; one command a line, with no pipes and the like."""
    for line in text.replace("\\\n", " ").splitlines():
        plain = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        plain.whitespace_split = True
        assert not [word for word in plain if word and set(word) <= set("|&;<>")], f"not one command a line: {line}"
        done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
        words = done.stdout.split("\0")[:-1]
        if words != [""]:
            yield words


def kind_of(words: list[str], needs: str | None = None) -> str:
    """What a command is; what it names outside the program is there.

    Raises:
        AssertionError: it is none that the tests know how to try.
    """
    match words:
        case ["adamerge", verb, *rest] if verb in VERBS:
            gone = [word for word in rest if word.startswith("configs/") and not (ROOT / word).exists()]
            assert not gone, f"there is no {gone}"
            return "adamerge"
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"no target {target}"
            return "make"
        case ["python", "-m", module, *overrides]:
            assert importlib.util.find_spec(module) is not None, f"no module {module}"
            assert not overrides or module == "adamerge.testbed.demo"
            return "module"
        case ["pip", "install", "-e", what]:
            known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
            assert set(what.removeprefix(".[").removesuffix("]").split(",")) <= set(known)
            return "setup"
        case ["python3", "-m", "venv", ".venv"] | ["source", ".venv/bin/activate"]:
            return "setup"
        case ["huggingface-cli", "download", *_] if needs == DOWNLOAD:
            return "download"
    raise AssertionError(f"the tests do not know how to try: {shlex.join(words)}")


def kind_of_config(content: Any) -> str:
    """Whether a YAML block is a pool, a method, or data to lay over a pool.

    Raises:
        AssertionError: it is none of them.
    """
    assert isinstance(content, dict) and content, "no mapping"
    model = content.get("model", {})
    if {"base", "experts"} <= model.get("task_vectors", {}).keys():
        return "pool"
    if "parametrization" in model:
        return "method"
    assert content.keys() == {"data"}, f"neither a pool nor a method nor data: {sorted(content)}"
    return "data"


# --- reading a command, without a fit ---------------------------------------------------------------------------------


def readings(words: list[str]) -> Iterator[list[str]]:
    """Words of ``adamerge fit`` that are read as the command's, one a method; none for runs, which must be there."""
    verb, rest = words[0], list(words[1:])
    if verb not in {"fit", "check", "compare"} or "--resume" in rest:
        return
    if verb == "compare":
        options, _ = compare_parsers()
        own, others = options.parse_known_args(rest)
        given = told_apart(others)
        pool, *methods = map(Path, given.files)
        for row in rows_of(pool, methods, Words(own.config, given.overrides), own.grid):
            yield row.words.in_order
        return
    if "--export" in rest:
        del rest[rest.index("--export") : rest.index("--export") + 2]
    yield [word for word in rest if not word.startswith("--")] + [word for word in rest if word.startswith("--")]


def read(capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    """Have the program's parser read a command: every file, key, class and value, of each stage of a method."""
    for arguments in readings(words):
        outcome = command(capfd, "fit", *arguments, "--print_config")  # of the first stage
        assert outcome.code == 0, f"adamerge {shlex.join(words)}\n{outcome.err[-2000:]}"
        for stage in configurations(arguments)[1:]:
            try:
                parser.read(stage)
            except AdamergeError as error:
                raise AssertionError(f"adamerge {shlex.join(words)}\n{error}") from error


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def beside_files(at_root, tmp_path, monkeypatch):
    """The files that the pages have people write can be imported."""
    for block in of("python"):
        written(block, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def written(block: Block, folder: Path) -> None:
    """Write a block that begins with a file's name to that file."""
    name = re.match(r"# (\w+\.py)\n", block.text)
    if name:
        (folder / name[1]).write_text(block.text)


def test_there_is_something_to_try():
    assert len(PAGES) == 7 and len(of("bash")) > 15 and len(of("python")) > 4 and len(of("yaml")) > 4


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_of_a_kind_that_is_tried(block):
    assert block.language in {"bash", "python", "yaml", "text"}, "text is for what is no code"
    assert block.needs in {None, DOWNLOAD}
    if block.language == "bash":
        assert all(kind_of(words, block.needs) for words in commands_of(block.text))
    elif block.language == "yaml":
        assert kind_of_config(yaml.safe_load(block.text))
    elif block.language == "python":
        compile(block.text, str(block), "exec")


def is_bundled(words: list[str]) -> bool:
    """Whether the models that a command names are there; those of a run are."""
    return {word for word in words if word.startswith("configs/pools/")} <= BUNDLED


def read_block(capfd: pytest.CaptureFixture[str], block: Block, bundled: bool) -> None:
    for words in commands_of(block.text):
        if words[0] == "adamerge" and is_bundled(words) == bundled:
            read(capfd, words[1:])
        elif words[:3] == ["python", "-m", "adamerge.testbed.demo"] and bundled:
            read(capfd, ["fit", str(POOLS["images"]), str(LAYER_WISE), *words[3:]])


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_the_commands_of_a_block_are_read_by_the_program(block, beside_files, capfd):
    read_block(capfd, block, bundled=True)


@pytest.mark.slow
@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_commands_on_models_of_others_are_read_by_the_program(block, beside_files, capfd):
    read_block(capfd, block, bundled=False)


OVERRIDES = sorted(
    {
        span
        for page in PAGES
        for span in re.findall(
            r"`(--[^`\n]+=[^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        )
    }
)
WITH = (
    "adamerging_layer_wise",
    "expert_merging",
    "atlas_ufm",
    "atlas_partition",
    "concrete_task_arithmetic",
    "concrete_adamerging_layer_wise",
    "expert_merging_plusplus",
    "wudi",
    "least_squares",
)


@pytest.mark.slow
@pytest.mark.parametrize("span", [span for span in OVERRIDES if span != "--key=value"])
def test_an_override_in_a_sentence_is_read_with_some_method(span, at_root, capfd):
    (words,) = commands_of(re.sub(r"\bN\b", "2", span).replace("online|offline|disabled", "offline"))
    faults = {}
    for method in WITH:
        path = METHODS / method
        given = path if path.is_dir() else path.with_suffix(".yaml")
        try:
            read(capfd, ["fit", str(POOLS["images"].relative_to(ROOT)), str(given.relative_to(ROOT)), *words])
        except AssertionError as error:
            faults[method] = str(error)
        else:
            return
    raise AssertionError("\n".join(faults.values()))


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_a_configuration_is_read_by_the_program(block, at_root, tmp_path, capfd):
    kind = kind_of_config(yaml.safe_load(block.text))
    file = tmp_path / f"{kind}.yaml"
    file.write_text(block.text)
    beside = {"pool": [LAYER_WISE], "method": [POOLS["images"]], "data": [POOLS["causal"], TASK_ARITHMETIC]}[kind]
    outcome = command(capfd, "fit", *beside, file, "--print_config")
    assert outcome.code == 0, outcome.err[-2000:]


@pytest.mark.parametrize("block", [block for block in of("python") if block.needs is None], ids=str)
def test_a_program_imports_public_names(block):
    import adamerge

    for names in re.findall(r"^from adamerge import (.+)$", block.text, re.M):
        assert set(re.split(r",\s*", names)) <= set(adamerge.__all__)


# --- the pages, command by command, as a person would -----------------------------------------------------------------


class Session:
    """A folder like the project's, in which a page's blocks run in order, fits shortened to a step."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capfd, self.run = folder, capfd, ""

    def play(self, block: Block) -> None:
        """Run what can run here of a block."""
        if block.needs is not None:
            return
        written(block, self.folder)
        if block.language == "python":
            text = re.sub(r"max_steps=\d+", "max_steps=1, limit_val_batches=1, enable_progress_bar=False", block.text)
            exec(compile(text, str(block), "exec"), {"__name__": "__main__"})
        elif block.language == "bash":
            for words in commands_of(block.text):
                if words[0] == "adamerge" and is_bundled(words):
                    self.adamerge(words[1:])

    def adamerge(self, words: list[str]) -> None:
        """Run a command, of a run that is at hand where it says RUN."""
        if "RUN" in words and not self.run:
            self.run = "runs/at/hand"
            self.adamerge(["fit", *map(str, (POOLS["images"], LAYER_WISE)), "--name=at", "--id=hand"])
        words = [self.run if word == "RUN" else word for word in words]
        outcome = command(self.capfd, *shortened(words))
        assert outcome.code == 0, f"adamerge {shlex.join(words)}\n{outcome.err[-2000:]}"
        if words[0] == "fit":
            found = re.search(r"^run: (.+)$", outcome.out, re.M)
            assert found and (Path(found[1]) / "coefficients.safetensors").is_file(), outcome.out[-500:]


def shortened(words: list[str]) -> list[str]:
    """The same command with one step a fit, two where it is resumed, few samples, and one coefficient of task arithmetic."""
    if words[0] not in {"fit", "compare"}:
        return words
    resumed = "--resume" in words
    short = [re.sub(r"^(--(\d+\.)?trainer\.max_steps)=.*", rf"\1={1 + resumed}", word) for word in words]
    if resumed:
        return short
    if not {"--data=null", "--data.shots=4"} & set(words):
        short.append("--data.calibration_samples=32")
    if words[0] == "compare":
        short += ["--lambdas", "0.3"]
    chosen = any("atlas" in word for word in words)  # a step, on the validation split
    return [*short, "--trainer.max_steps=1", f"--trainer.limit_val_batches={int(chosen)}"]


@pytest.fixture
def session(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_anew(monkeypatch, "mypaper")
    without_pictures(monkeypatch)
    return Session(tmp_path, capfd)


def test_the_commands_of_the_readme_run_on_a_tiny_pool(session, pool, image_folders):
    """In seconds: where the page has the bundled images stand two tasks of noise."""
    (session.folder / "configs").mkdir()
    (session.folder / "configs/methods").symlink_to(METHODS)
    write_yaml(session.folder / "configs/pools/testbed_images.yaml", pool_config(pool, image_folders))
    for block in (block for block in BLOCKS if block.page == "README.md"):
        if block.language == "bash" or block.text.startswith("# mypaper.py"):
            session.play(block)
    assert (session.folder / "merged-by-experts" / "open_clip_model.safetensors").is_file()
    assert json.loads((session.folder / "runs/comparison/comparison.json").read_text())["methods"].keys() >= {"ties"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_a_page_from_its_first_to_its_last_command(page, session):
    for name in ("adamerge", "configs"):
        (session.folder / name).symlink_to(ROOT / name)
    for block in (block for block in BLOCKS if block.page == page):
        session.play(block)


class Pickled(torch.nn.Module):
    """As the papers' experts are: the image tower's tensors below ``model.visual``, others beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.ModuleDict({"visual": torch.nn.Linear(2, 2), "text": torch.nn.Linear(2, 2)})


@pytest.mark.parametrize("source", ["ViT-B-32/SUN397/finetuned.pt", "ViT-B-32/CarsVal/nonlinear_finetuned.pt"])
def test_a_conversion_of_pickles_gives_the_image_tower_alone(source, tmp_path, monkeypatch):
    (block,) = (block for block in of("python") if source in block.text)
    monkeypatch.chdir(tmp_path)
    Path(source).parent.mkdir(parents=True)
    module = Pickled()
    torch.save(module.state_dict() if "state_dict()" not in block.text else module, source)
    exec(compile(block.text, str(block), "exec"), {})
    (file,) = tmp_path.glob("checkpoints/*/ViT-B-32/*.safetensors")
    tensors = load_file(file)
    assert tensors.keys() == {"visual.weight", "visual.bias"}
    assert torch.equal(tensors["visual.weight"], module.model["visual"].weight)
    pool = yaml.safe_load((CONFIGS / f"pools/clip_vit_b32_{file.parts[-3]}.yaml").read_text())
    assert file.relative_to(tmp_path).as_posix() in pool["model"]["task_vectors"]["experts"].values()


# --- links, lengths, figures ------------------------------------------------------------------------------------------


def prose(path: Path) -> str:
    """A page without its blocks of code and its spans of code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    return {anchor_of(title) for title in re.findall(r"^#+ (.+)$", text, re.M)}


def refuse_dead(target: str, page: Path) -> None:
    place, _, anchor = target.partition("#")
    path = (page.parent / place).resolve() if place else page
    assert path.exists(), f"{page.name}: there is no {place}"
    assert not anchor or anchor in anchors(path), f"{page.name}: {path.name} has no heading #{anchor}"


LINKS = [
    (page, target) for page in PAGES for target in re.findall(r"\]\(([^)]+)\)", prose(page)) if "://" not in target
]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=lambda value: str(getattr(value, "name", value)))
def test_a_link_leads_somewhere(page, target):
    refuse_dead(target, page)


def test_every_page_is_linked_from_the_readme():
    named = {target.partition("#")[0] for page, target in LINKS if page == README}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= named


def test_the_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= 160


def test_the_rooms_of_the_readme_are_those_of_the_package():
    (block,) = (block for block in of("text") if block.page == "README.md" and "parametrizations " in block.text)
    rooms = [line.split()[0] for line in block.text.splitlines()]
    folders = {path.parent.name for path in (ROOT / "adamerge").glob("*/__init__.py")}
    assert len(rooms) == len(set(rooms)) and set(rooms) == folders


def rows(path: Path, heading: str) -> dict[str, list[str]]:
    """The rows of the table whose first column is so headed, by the code in their first cell."""
    lines = iter(path.read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {heading} |"))
    found = {}
    for line in lines:
        if not line.startswith("|"):
            return found
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        name = re.fullmatch(r"`(\w+)`", cells[0])
        if name:
            found[name[1]] = cells[1:]
    return found


def test_every_method_has_its_row():
    assert rows(ROOT / "docs/methods.md", "config").keys() == {path.stem for path in METHODS.iterdir()}


def test_every_pool_has_its_row():
    named = (ROOT / "docs/pools.md").read_text()
    spans = re.findall(r"`(\w*(?:\{[\w,]+\})?\w*)`", named)
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {' '.join(spans)}"], capture_output=True, text=True)
    pools = {
        path.stem for path in (CONFIGS / "pools").glob("*.yaml") if path.stem not in {p.stem for p in POOLS.values()}
    }
    assert pools <= set(done.stdout.split())


def header_file(method: str) -> Path:
    """The file whose first lines speak for a method."""
    path = METHODS / f"{method}.yaml"
    return path if path.is_file() else min((METHODS / method).glob("1_*.yaml"))


@pytest.mark.parametrize("method", rows(README, "config"))
def test_a_figure_is_the_same_wherever_it_stands(method):
    ours = rows(README, "config")[method][2]
    assert rows(ROOT / "docs/methods.md", "config")[method][5] == ours
    assert f"{ours} %" in labels_of(header_file(method))["EXPECT"]


def test_the_picture_shows_the_figures_of_the_tables():
    figures = json.loads((ROOT / "docs/first_page.json").read_text())["methods"]
    table = rows(ROOT / "docs/methods.md", "config")
    for method, row in figures.items():
        if method in table:
            spread = (max(row["average"]) - min(row["average"])) / 2
            shown = f"{mean(row['average']):.1f}" + (f" ± {spread:.1f}" if len(row["average"]) > 1 else "")
            assert table[method][5] == shown
    assert {"adamerging_layer_wise", "expert_merging", "atlas_addition", "ties"} <= figures.keys() & table.keys()
    alt = re.search(r"!\[(.+)\]\(docs/first_page.png\)", README.read_text())
    assert alt and all(
        f"{mean(figures[name]['average']):.1f} %" in alt[1] for name in ("pretrained", "expert_merging", "individual")
    )


# --- the first lines of the configurations ----------------------------------------------------------------------------

HEADED = sorted(CONFIGS.rglob("*.yaml"))
LABELS = ("WHAT", "PAPER", "RUN", "EXPECT", "DIFFERS")
MOST_LINES, WIDTH = 10, 120


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


@pytest.mark.parametrize("path", HEADED, ids=name_of)
def test_a_configuration_opens_with_its_labels(path):
    assert len(header(path)) <= MOST_LINES
    assert all(len(line) <= WIDTH for line in header(path))
    labels = labels_of(path)
    assert list(labels) == [label for label in LABELS if label in labels], "in this order, and no others"
    room = path.relative_to(CONFIGS).parts[0]
    needed = {"WHAT", "RUN"} | ({"EXPECT"} if room in {"methods", "pools"} else set())
    assert needed <= labels.keys()
    if room == "methods":
        assert "https://arxiv.org/abs/" in labels.get("PAPER", "") or "no paper of its own" in labels["WHAT"]
        assert re.search(r"\d %", labels["EXPECT"]), "a number to expect"
        assert re.search(r"seconds|minute", labels["EXPECT"]), "and how long it takes"


@pytest.mark.parametrize("path", HEADED, ids=name_of)
def test_what_a_configuration_points_at_is_there(path):
    for target in re.findall(r"(?:docs|adamerge)/[\w/.#-]*\w", " ".join(labels_of(path).values())):
        refuse_dead(target, ROOT / "README.md")


def its_command(path: Path) -> list[str]:
    (words,) = commands_of(labels_of(path)["RUN"])
    return words


@pytest.mark.parametrize(
    "path",
    # test_configs.py reads every pool; here its whole command
    [pytest.param(path, marks=pytest.mark.slow) if path.parent.name in {"pools", "tasks"} else path for path in HEADED],
    ids=name_of,
)
def test_the_command_of_a_configuration_is_read_by_the_program(path, at_root, capfd):
    words = its_command(path)
    assert words[:2] == ["adamerge", "fit"]
    given = path if path.parent.parent == CONFIGS else path.parent
    assert given.relative_to(ROOT).as_posix() in words, "the command is with this file"
    read(capfd, words[1:])
