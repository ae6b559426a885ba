"""Every notebook runs from start to end, and shows what it promises."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LEFT = {
    "1_learn_coefficients": {"merged/open_clip_model.safetensors", "heatmap.png"},
    "2_what_carries": {"ablation.png"},
}
"""What each leaves in its folder."""


def test_there_are_notebooks():
    assert LEFT.keys() == {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_ROOT", str(ROOT))
    monkeypatch.setenv("ADAMERGE_NOTEBOOK_OUTPUT", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all((tmp_path / name).stat().st_size > 10_000 for name in LEFT[path.stem])
