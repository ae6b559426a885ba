"""The architecture: imports point one way, the engine needs no trainer, every module has its tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adamerge"
NAMES_IN_ORDER = """
errors precision heap public_names versions pickles trainer_settings files links places untrusted_settings staging
config_files described help command_line class_names signatures layout factors checkpoint weights renaming renamed
lora_configuration adapters sources origins remote rows sums groups deltas combinations streamed low_rank
coefficient_file transforms patterns leftovers agreement task_vectors memory kept_deltas conveyor storage automatic
copies way_back constraints parametrizations merging penalties parts passes units blocks shards plan plan_report pool
model_files checking backbones merged_model recipe coefficients allocation exported_files export adapter_export
inspection heatmap_cells heatmap evaluation confusions objectives data modules selection redaction tracker wandb_run tracking
run_checkpoints run_folders callbacks summary faults configuration run_config environment preparation stage_configs runs
stages scoring comparison testbed pool_verbs cli
"""
ORDER = re.findall(r"\w+", NAMES_IN_ORDER)
PLAIN = ORDER[: ORDER.index("inspection") + 1]
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

    return adamerge._HOMES


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


def test_the_order_names_what_exists():
    there = {part_of(path) for path in MODULES}
    assert there == set(ORDER)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("from adamerge.cli import main", 1),
        ("def f():\n    import adamerge.modules.base", 1),
        ("from adamerge import LayerWise", 1),
        ("from adamerge import __version__, errors", 0),
        ("if TYPE_CHECKING:\n    from adamerge.cli import main\nelse:\n    from adamerge.runs import x", 1),
        ("from adamerge.errors import AdamergeError\nimport torch, adamerge", 0),
        ("import importlib\nimportlib.import_module('adamerge.export')", 1),
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


@pytest.mark.parametrize("module", ["adamerge.export", "adamerge.inspection", "adamerge.checking"])
def test_the_engine_loads_no_trainer_tracker_data_or_networks(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules], 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split("\n")[0] == "[] True"


def test_up_to_inspection_nothing_even_names_them():
    for path in MODULES:
        if part_of(path) in PLAIN and part_of(path) != "backbones":
            names = {name.split(".")[0] for _, name in imported(ast.parse(path.read_text()), homes())}
            assert not names & set(HEAVY), path


def test_the_package_itself_loads_nothing():
    code = (
        "import sys, adamerge; print([n for n in ('torch', 'numpy', 'safetensors', 'lightning') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts))
def test_every_module_has_its_mirror(path):
    place = path.relative_to(PACKAGE)
    mirrors = [ROOT / "tests" / place.parent / f"test_{place.name}", ROOT / "tests" / f"test_{place.name}"]
    found = [mirror for mirror in mirrors[: 2 if place.name != "base.py" else 1] if mirror.is_file()]
    assert found, f"{place} needs {mirrors[0].relative_to(ROOT)}"
    assert "def test_" in found[0].read_text()


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
