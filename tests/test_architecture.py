"""The architecture: imports point one way, the engine needs no trainer, every module has its tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adamerge"
ORDER = [
    "errors", "io", "precision", "checkpoints", "deltas", "backbones", "transforms", "task_vectors", "parametrizations",
    "merging", "artifacts", "objectives", "data", "training", "runs", "cli", "testbed",
]  # fmt: skip
"""Rooms and root files: each imports only what stands before it."""
ROOMS = [name for name in ORDER if (PACKAGE / name).is_dir()]
PLAIN = ORDER[: ORDER.index("artifacts") + 1]
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
MODULES = [path for path in SOURCES if path.name not in {"__init__.py", "__main__.py"}]


def part_of(path: Path) -> str:
    """The name in ORDER that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(tree: ast.AST, homes: dict[str, str]) -> list[tuple[int, str]]:
    """Line and full name of everything that is imported at run time, in functions too."""
    found = []

    def walk(node: ast.AST) -> None:
        if is_type_checking(node):
            for other in node.orelse:
                walk(other)
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            if node.module == "adamerge":
                for alias in node.names:
                    home = homes.get(alias.name, alias.name)
                    found.append((node.lineno, "adamerge" if alias.name == "__version__" else f"adamerge.{home}"))
            else:
                found.append((node.lineno, node.module or ""))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.extend((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(tree)
    return found


def homes() -> dict[str, str]:
    import adamerge

    return adamerge.HOMES


def wrong_imports(text: str, part: str) -> list[str]:
    allowed = ORDER[: ORDER.index(part) + 1]
    wrong = []
    for line, name in imported(ast.parse(text), homes()):
        first, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if first == "adamerge" and target and target not in allowed:
            wrong.append(f"line {line}: {part} imports {name}")
    return wrong


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE or p in MODULES], ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    part = part_of(path)
    assert part in ORDER, f"{path} has no place in the order of imports"
    assert not wrong_imports(path.read_text(), part)


def test_the_top_level_is_five_files_and_the_rooms():
    there = {path.name for path in PACKAGE.iterdir() if path.name not in {"__pycache__", "py.typed"}}
    assert there == {*ROOMS, "__init__.py", "__main__.py", "cli.py", "errors.py", "precision.py"}
    assert {part_of(path) for path in MODULES} == set(ORDER)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("from adamerge.cli import main", 1),
        ("def f():\n    import adamerge.training.base", 1),
        ("from adamerge import LayerWise", 1),
        ("from adamerge import __version__, errors", 0),
        ("if TYPE_CHECKING:\n    from adamerge.cli import main\nelse:\n    from adamerge.runs.fit import x", 1),
        ("from adamerge.errors import AdamergeError\nimport torch, adamerge", 0),
        ("import importlib\nimportlib.import_module('adamerge.artifacts.export')", 1),
    ],
)
def test_a_wrong_import_is_found(text, wrong):
    assert len(wrong_imports(text, "deltas")) == wrong


HEAVY = [
    "lightning",
    "pytorch_lightning",
    "wandb",
    "datasets",
    "open_clip",
    "torchvision",
    "transformers",
    "matplotlib",
]


def test_the_engine_loads_no_trainer_tracker_data_or_networks():
    every = "adamerge.artifacts.export, adamerge.runs.inspection, adamerge.runs.check"
    code = f"import sys, {every}; print([name for name in {HEAVY} if name in sys.modules], 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split("\n")[0] == "[] True"


def test_up_to_artifacts_nothing_even_names_them():
    for path in MODULES:
        if part_of(path) in PLAIN and part_of(path) != "backbones":
            names = {name.split(".")[0] for _, name in imported(ast.parse(path.read_text()), homes())}
            pictures = {"matplotlib"} if path.name == "heatmap.py" else set()
            assert not names & {*HEAVY} - pictures, path


def test_the_package_itself_loads_nothing():
    code = (
        "import sys, adamerge; print([n for n in ('torch', 'numpy', 'safetensors', 'lightning') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts))
def test_every_module_has_its_mirror(path):
    place = path.relative_to(PACKAGE)
    mirror = ROOT / "tests" / place.parent / f"test_{place.name}"
    assert mirror.is_file(), f"{place} needs {mirror.relative_to(ROOT)}"
    assert "def test_" in mirror.read_text()


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "helpers", "helper", "misc", "common", "tools", "registry"}
    assert not [path for path in SOURCES if drawers & {part.removesuffix(".py") for part in path.parts[-3:]}]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts))
def test_every_file_tells_its_story_in_its_first_line(path):
    story = ast.get_docstring(ast.parse(path.read_text()))
    assert story and story.splitlines()[0].endswith(".")


def test_constructors_take_no_nameless_arguments():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                assert node.args.kwarg is None, f"{path}:{node.lineno}: **kwargs hides the schema"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_in_which_order_to_read_it(room):
    story = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    files = [path.stem for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"]
    silent = [name for name in files if f"``{name}``" not in story and f"{name}.py``" not in story]
    assert not silent, f"the first lines of adamerge/{room}/__init__.py do not mention {silent}"


def test_no_conflict_is_left():
    """In a docstring it would be valid Python."""
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    assert not [path for path in SOURCES if any(line.startswith(marks) for line in path.read_text().splitlines())]


def test_a_file_of_more_than_250_lines_says_why():
    for path in SOURCES:
        text = path.read_text()
        if len(text.splitlines()) > 250:
            assert "# Longer than 250 lines: " in text, f"{path} has found a second job: give it a name, or say why"
