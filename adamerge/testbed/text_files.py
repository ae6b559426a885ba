"""Finding the testbed's texts on this machine: folders of installed packages and of the standard library."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

STANDARD_LIBRARY = "the standard library"


def package_folder(package: str) -> Path:
    """Find an installed package's folder, without importing it."""
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the testbed's texts need the package {package!r}. Run: pip install 'adamerge[demo]'"
        )
    return Path(spec.origin).parent


def sorted_files(folder: Path, pattern: str) -> list[Path]:
    """Files under ``folder`` that match, in an order that depends on their names alone."""
    return sorted(folder.glob(pattern), key=lambda file: file.relative_to(folder).as_posix())
