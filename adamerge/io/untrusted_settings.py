"""Settings in a model's files that would make a library run code, open other files or connect: refused before any is built.

The libraries that build networks and tokenizers hand many values of these files on as arguments. What a value may be is said
here for those that do more than describe a network; a new one that is found belongs here too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import CheckpointError
from adamerge.io.untrusted_files import quoted, read_json

FILES = (
    *("config.json", "open_clip_config.json", "generation_config.json", "tokenizer_config.json"),
    *(
        "processor_config.json",
        "preprocessor_config.json",
        "image_processor_config.json",
        "video_preprocessor_config.json",
    ),
)
"""Files of a model's folder whose values reach a library."""

LARGEST = 100_000_000  # bytes: a tokenizer's configuration may list all of its tokens

IMPLEMENTATIONS = frozenset(
    {
        *("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
        *("grouped_mm", "batched_mm"),
    }
)
"""Ways of attention and of experts that are part of transformers; any other is code that it downloads and runs."""

TOKENIZER_ARGUMENTS: Mapping[str, type | tuple[type, ...]] = {
    **{"clean": str, "reduction_mask": str, "language": str, "padding_side": str, "truncation_side": str},
    **{"strip_sep_token": bool, "use_fast": bool, "add_prefix_space": bool, "do_lower_case": bool},
    **{
        "add_bos_token": bool,
        "add_eos_token": bool,
        "legacy": bool,
        "model_max_length": int,
        "additional_special_tokens": list,
    },
}
"""What an open_clip configuration may tell its tokenizer, and of which type: nothing that opens, connects or runs."""

_NAME = re.compile(r"[\w.-]+", re.ASCII)  # of an architecture: no source before a colon, no path
_HUB_ID = re.compile(r"(?!.*\.\.)[\w.-]+(/[\w.-]+)?", re.ASCII)


def _is_off(value: Any) -> bool:
    return value is None or value is False


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, dict) or (isinstance(value, str) and bool(_NAME.fullmatch(value)))


def _is_hub_id(value: Any) -> bool:
    """Returns whether a name is on the Hub and no path here, where a library would look first."""
    return value is None or (isinstance(value, str) and bool(_HUB_ID.fullmatch(value)) and not Path(value).exists())


def _is_implementation(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_implementation(item) for item in value.values())
    return value is None or value in IMPLEMENTATIONS


def _is_numeric(value: Any) -> bool:
    """Numbers, and lists and mappings of them: what describes a network and names nothing."""
    if isinstance(value, dict):
        return all(_is_numeric(item) and not str(key).startswith("pretrained") for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_numeric, value))
    return value is None or isinstance(value, int | float)


def _are_tokenizer_arguments(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and not list(_other_arguments(value)))


def _other_arguments(value: Mapping[str, Any]) -> Iterator[str]:
    for key, item in value.items():
        kind = TOKENIZER_ARGUMENTS.get(key)
        words = isinstance(item, list) and not all(isinstance(one, str) for one in item)
        if kind is None or not isinstance(item, kind) or words:
            yield key


_ARCHITECTURE = "the name of an architecture, without a source or a path"
RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "trust_remote_code": (_is_off, "false, or nothing"),
    **dict.fromkeys(
        (
            *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
            *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        ),
        (_is_implementation, f"one of {sorted(IMPLEMENTATIONS)}: any other is code to download"),
    ),
    "audio_tokenizer": (_is_off, "nothing: it names another model to load"),
    "model_args": (_is_numeric, "numbers alone, of the network's shape"),
    "backbone_kwargs": (_is_numeric, "numbers alone, of the network's shape"),
    "architecture": (_is_name, _ARCHITECTURE),
    "backbone": (_is_name, _ARCHITECTURE),
    "timm_model_name": (_is_name, _ARCHITECTURE),
    "hf_model_name": (_is_hub_id, "the name of a model on the Hub, and no path"),
    "tokenizer_kwargs": (_are_tokenizer_arguments, f"of {sorted(TOKENIZER_ARGUMENTS)}"),
}
"""What a setting of this name may be, wherever it stands in one of the files, in words too."""


def refuse_harmful(folder: Path) -> None:
    """Refuses settings of a model's folder that could harm, of all those that reach a library.

    Raises:
        CheckpointError: one would make the library run code, open other files or connect; it names file and setting.
    """
    settings = {name: _settings(folder / name) for name in FILES if (folder / name).is_file()}
    for name, config in settings.items():
        _refuse_harmful_in(folder / name, config)
    # open_clip would ask at the terminal whether that code may run, and it is not asked to
    name = "tokenizer_config.json"
    if "open_clip_config.json" in settings and settings.get(name, {}).get("auto_map"):
        raise _refused(
            folder / name, "auto_map", "a tokenizer of transformers' own, without auto_map", "code of the folder's"
        )


def _settings(path: Path) -> dict[str, Any]:
    """Returns the content of a settings file; nothing where no library can read it either, such as a torn one."""
    try:
        return read_json(path, LARGEST)
    except CheckpointError:
        if path.stat().st_size > LARGEST:
            raise
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError, OSError):
            return {}
        raise  # others read what is told apart here, such as a key that is there twice


def _refuse_harmful_in(path: Path, config: Mapping[str, Any]) -> None:
    waiting: list[tuple[str, Any]] = [("", config)]  # a list, since a hostile file nests as deep as it likes
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(where, item) for item in value]
        for key, item in value.items() if isinstance(value, dict) else ():
            place = f"{where}{key}"
            if key in RULES and not RULES[key][0](item):
                if key == "tokenizer_kwargs" and isinstance(item, dict):
                    first = next(_other_arguments(item))
                    place, item = f"{place}.{first}", item[first]
                raise _refused(path, place, RULES[key][1], item)
            waiting.append((f"{place}.", item))


def _refused(path: Path, place: str, expected: str, got: Any) -> CheckpointError:
    return CheckpointError(
        f"{quoted(path)}: '{place}' is not handed on to a library",
        expected=expected,
        got=quoted(got),
        todo="remove it from the file if you trust the model without it, or take another copy of the model",
    )
