"""Finding texts: folders of packages that are not imported, files in an order of their names."""

import sys
from pathlib import Path

import pytest

from adamerge.testbed.text_files import STANDARD_LIBRARY, package_folder, sorted_files


def test_a_package_is_found_and_not_imported():
    folder = package_folder("sqlparse")
    assert (folder / "__init__.py").is_file()
    assert "sqlparse" not in sys.modules


def test_the_standard_library_is_this_pythons():
    assert package_folder(STANDARD_LIBRARY) / "json" / "__init__.py" == Path(sys.modules["json"].__file__)


def test_a_package_that_is_missing_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match=r"the package 'nowhere_at_all'. Run: pip install 'adamerge\[demo\]'"):
        package_folder("nowhere_at_all")


def test_files_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.py", "a/z.py", "a.py", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [file.relative_to(tmp_path).as_posix() for file in sorted_files(tmp_path, "**/*.py")]
    assert found == ["a.py", "a/z.py", "b.py"]
