"""Pickles, which may run code when opened: told apart by the names in them, without opening any, and what to do with each."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

MOST = 64_000_000  # bytes of a pickle that are looked at; a state dict's take about 100 a tensor
LEGACY = 0x1950A86A20F9469CFC6C
"""The number that files of torch before 1.6 begin with; theirs is the fourth pickle in them."""

# what the tensors of a state dict are made of; everything else is a class or function that unpickling would import
_PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_\w+|torch\.nn\.parameter Parameter|torch\._tensor _rebuild\w+"
    r"|torch(\.storage)? (\w*Storage|_load_from_bytes)|_codecs encode"
    r"|torch (device|Size|b?float\d*|double|half|u?int\d+|long|bool)"
)
_SAVE = (
    "then safetensors' save_file({name: x.clone() for name, x in tensors.items() if torch.is_tensor(x)}, "
    "'model.safetensors')"
)
_TRUSTED = "if you trust who wrote it, since it may run any code: "


def described(path: Path) -> tuple[str, str]:
    """Returns what a file that looks like a pickle holds, and what a user can do to get safetensors of it."""
    name = path.name
    try:
        kind, names, protocol = _looked_into(path)
    except Exception:  # whatever a stranger's bytes make of the reader: it is only about which advice is given
        return (
            "a pickle, which may run code when opened",
            "copy or download it again, or look for a safetensors version",
        )
    if kind == "script":
        return (
            "a pickled TorchScript archive, a whole module with its code",
            f"{_TRUSTED}tensors = torch.jit.load({name!r}, map_location='cpu').state_dict(), {_SAVE}",
        )
    foreign = [called.replace(" ", ".") for called in sorted(set(names)) if not _PLAIN.fullmatch(called)]
    foreign.sort(key=lambda called: called.startswith(("torch.", "builtins.", "__builtin__.")))  # the least known first
    safe = kind != "bare" and not foreign and protocol <= 2  # what torch reads without running any code
    load = f"tensors = torch.load({name!r}, map_location='cpu', weights_only={safe})"
    if kind == "bare":
        load = f"tensors = pickle.load(open({name!r}, 'rb'))"
    if safe:
        return (
            "a pickled state dict",
            f"{load}, which runs no code (a dict inside a dict is taken out first), {_SAVE}",
        )
    if not foreign:
        return f"a pickle of tensors that torch opens only as code (protocol {protocol})", f"{_TRUSTED}{load}, {_SAVE}"
    some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
    return (
        f"a pickle of whole objects ({some})",
        f"{_TRUSTED}where these are installed, {load}, of a module its .state_dict(), {_SAVE}",
    )


def _looked_into(path: Path) -> tuple[str, list[str], int]:
    """Returns ``zip``, ``script``, ``legacy`` or ``bare``; what unpickling would import; the pickle's protocol."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            data = next(name for name in members if name.rpartition("/")[2] == "data.pkl")
            root = data.removesuffix("data.pkl")
            if f"{root}constants.pkl" in members and any(name.startswith(f"{root}code/") for name in members):
                return "script", [], 2
            with archive.open(data) as file:
                return "zip", *_read(io.BytesIO(file.read(MOST)))
    with path.open("rb") as file:
        start = io.BytesIO(file.read(MOST))
    first = [argument for code, argument, _ in pickletools.genops(start) if code.name.startswith("LONG")]
    if first != [LEGACY]:
        start.seek(0)
        return "bare", *_read(start)
    for _ in range(2):  # protocol and machine
        _read(start)
    return "legacy", *_read(start)


def _read(file: IO[bytes]) -> tuple[list[str], int]:
    """Returns ``module name`` of everything that the next pickle of a file imports, and its protocol."""
    names: list[str] = []
    texts: list[str] = []
    memory: dict[int, str] = {}
    protocol = 0
    for code, argument, _ in pickletools.genops(file):
        if code.name == "PROTO":
            protocol = int(str(argument))
        elif code.name in {"GLOBAL", "INST"}:
            names.append(str(argument))
        elif code.name == "STACK_GLOBAL":
            names.append(" ".join(texts[-2:]))
        elif code.name == "MEMOIZE":
            memory[len(memory)] = texts[-1] if texts else ""
        elif code.name in {"BINGET", "LONG_BINGET"} and argument in memory:
            texts.append(memory[argument])
        elif isinstance(argument, str):
            texts.append(argument)
    return names, protocol
