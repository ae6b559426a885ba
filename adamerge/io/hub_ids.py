"""Places: whether what a user wrote names something on this machine, or is an id on the Hub."""

from __future__ import annotations

import os
import re

_PART = r"[a-zA-Z0-9][\w.-]{0,95}"
# the ending of a file's name tells that a path was meant
_FILES = r"safetensors|bin|pt|pth|ckpt|jsonl?|ndjson|[ct]sv|parquet|arrow|txt|ya?ml|zip|tar|gz|bz2|xz|zst"
_HUB_ID = re.compile(rf"(?!.*\.({_FILES})$){_PART}/{_PART}(@[\w./-]+)?", re.ASCII | re.IGNORECASE)


def is_hub_id(text: str) -> bool:
    """Returns whether text is ``org/name[@revision]`` on the Hub; what looks like a path is one, existing or not.

    A path is whatever exists here, begins with ``.``, ``/`` or ``~``, has no slash or several, ends like a file of
    data or weights, or begins with the name of a folder that exists here: of ``data/cars`` without such a folder, while
    there is a folder ``data``, nothing is looked for on the Hub or in its cache.
    """
    if os.path.lexists(os.path.expanduser(text)) or not _HUB_ID.fullmatch(text):
        return False
    return not os.path.isdir(text.partition("/")[0])


def missing(text: str) -> str:
    """Returns, in words, what is wrong with a path that does not exist, and where it would be."""
    place = os.path.abspath(os.path.expanduser(text))
    if os.path.islink(place):
        return f"{place} is a link to {os.readlink(place)}, which does not exist"
    return f"there is no {place}"
