"""Links: what is copied or handed to a library may not lead out of its folder; a step back behind one leads elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from adamerge.errors import CheckpointError
from adamerge.io.untrusted_files import quoted

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
TEMPLATES = "additional_chat_templates"  # the one folder that transformers looks into


def without_steps_back(place: str) -> str:
    """Returns the absolute path of a place without ``..``, in which links stay unless a step back follows one."""
    plain = os.path.abspath(place)
    # behind a link a step back leads elsewhere
    return plain if os.path.exists(plain) and os.path.samefile(plain, place) else os.path.realpath(place)


def refuse_outside(path: Path) -> None:
    """Raises CheckpointError where a file is a link out of its folder; the Hub cache's links to its own blobs are none.

    Whoever made the folder could else have any file of this machine read and copied into what others are given. Weights
    may be links to anywhere: only numbers are taken from them.
    """
    folder = Path(os.path.realpath(path.parent))
    target = Path(os.path.realpath(path))
    if target.is_relative_to(folder):
        return
    for place in (folder, *folder.parents):  # models--ORG--NAME/snapshots/REVISION/..., and blobs beside snapshots
        if place.parent.name == "snapshots" and target.parent == place.parent.parent / "blobs":
            return
    raise CheckpointError(
        f"{quoted(path)} is a link that leads out of its folder",
        expected=f"a file in {folder}",
        got=target,
        todo="copy the file there, if it is what belongs there",
    )


def refuse_links_outside(folder: Path) -> None:
    """Raises CheckpointError where a file beside the weights of a model's folder, or all of its templates, lead out of it."""
    templates = folder / TEMPLATES
    for path in [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]:
        if path.is_symlink() and path.suffix not in WEIGHTS and (path == templates or not path.is_dir()):
            refuse_outside(path)
