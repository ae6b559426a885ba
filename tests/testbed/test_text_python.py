"""Texts around Python code: each role is found in a source made for it, and nothing else is."""

import sys

import pytest

from adamerge.testbed import text_python
from adamerge.testbed.text_python import Text, first_sentence, harvest

SOURCE = '''
"""A module's docstring is no role."""
import warnings

# This comment is long enough.
# short one
text = """
# This one stands inside a string, so it is no comment.
"""

class Box:
    """Keep things apart. And more."""

    def open(self, lid):
        """Open the box
        with its lid.

        Parameters
        ----------
        lid : str
            What closes the box.
        """
        logger.info("Opening the box number %d", 3)
        warnings.warn(f"The lid {lid} is worn")
        raise ValueError("No box has %s lids" % lid)

    async def close(self, lid):
        """Close it.

        Args:
            lid (str): What closes
                the box again and again.
        """
        parser.add_argument("--lid", help="which lid " "to take")
        raise KeyError("the lid {} is gone".format(lid))

def nothing():
    raise ValueError(message)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "boxes_for_testing"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "box.py").write_text(SOURCE)
    (folder / "tests" / "more.py").write_text('def test():\n    """Tests are left out."""\n')
    (folder / "broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    harvest.cache_clear()
    yield folder.name
    harvest.cache_clear()


def test_every_role_is_found_once(package):
    assert sorted(harvest(package)) == sorted(
        [
            Text("comment", "This comment is long enough."),
            Text("class", "Keep things apart."),
            Text("function", "Open the box with its lid."),
            Text("function", "Close it."),
            Text("parameter", "What closes the box."),
            Text("parameter", "What closes the box again and again."),
            Text("log", "Opening the box number %d"),
            Text("warning", "The lid {} is worn"),
            Text("help", "which lid to take"),
            Text("error", "No box has %s lids", "ValueError"),
            Text("error", "the lid {} is gone", "KeyError"),
        ]
    )
    assert package not in sys.modules  # read, not run


def test_a_long_file_is_passed_over(package, monkeypatch):
    monkeypatch.setattr(text_python, "BYTES", len(SOURCE) - 1)
    assert harvest(package) == ()


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One. Two.", "One."),
        ("One thing,\n    on two lines\n\n    More.", "One thing, on two lines"),
        ("Version 1.5 of it. More", "Version 1.5 of it."),
        ("Return `x`. Or not.", "Return `x`."),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence
