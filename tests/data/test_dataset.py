"""The rows of a split as a type: no class that a configuration names has the parser import the library of data sets."""

import ast

import pytest
from running import ROOT

CONFIGURED = [
    *(f"data/{name}" for name in ("base", "classes", "images", "image_text", "language", "no_data", "tables", "text")),
    *("data/table_calibration", "testbed/data"),
]


@pytest.mark.parametrize("name", CONFIGURED)
def test_modules_of_configured_classes_import_no_library_for_type_checkers_alone(name):
    """The parser executes those imports when it looks at the arguments of a class of the module."""
    tree = ast.parse((ROOT / "adamerge" / f"{name}.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    assert not [block for block in blocks if "datasets" in ast.unparse(block) or "lightning" in ast.unparse(block)]


def test_for_type_checkers_it_is_the_librarys():
    text = (ROOT / "adamerge" / "data" / "dataset.py").read_text(encoding="utf-8")
    assert "if TYPE_CHECKING:\n    from datasets import Dataset\nelse:" in text
