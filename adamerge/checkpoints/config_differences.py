"""Model files: what configuration, tokenizer and chat template beside two models' weights say that the weights do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import AdamergeError
from adamerge.io.untrusted_files import quoted, read_json

_DECISIVE = """
model_type vocab_size hidden_act hidden_activation activation_function act_fn quick_gelu layer_norm_eps layer_norm_epsilon
rms_norm_eps norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor tie_word_embeddings num_attention_heads
num_key_value_heads num_experts_per_tok sliding_window attn_logit_softcapping final_logit_softcapping scale_attn_weights
logit_scale is_decoder patch_size image_size
"""
DECISIVE = frozenset(_DECISIVE.split())
"""Settings of a ``config.json`` by which the same weights compute something else."""

LARGEST = 100_000_000
"""Bytes of a tokenizer's file."""


def unlike(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """What an expert's files say otherwise than the base's, in a sentence each; the merged model has the base's.

    Settings are compared where both have them, and files where both models are folders on this machine.
    """
    ours, theirs = _folder(base), _folder(expert)
    if ours is None or theirs is None or ours == theirs:
        return []
    try:
        return [*_configs(ours, theirs), *_tokenizers(ours, theirs), *_templates(ours, theirs)]
    except AdamergeError as error:
        return [f"a file beside its weights cannot be compared: {error.what}"]


def _folder(model: Checkpoint) -> Path | None:
    return model.sources[0].parent if model.sources else None


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, LARGEST) if path.is_file() else {}


def _configs(ours: Path, theirs: Path) -> Iterator[str]:
    for name in ("config.json", "open_clip_config.json"):
        for key, own, other in _differing(_read(ours / name), _read(theirs / name)):
            yield f"{name}: {key} is {quoted(str(other))}, in the base {quoted(str(own))}"


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in (key for key in ours if key in theirs):
        own, other = ours[key], theirs[key]
        if key in DECISIVE:
            if own != other:
                yield f"{path}{key}", own, other
        elif isinstance(own, dict) and isinstance(other, dict):
            yield from _differing(own, other, f"{path}{key}.")


def _tokenizers(ours: Path, theirs: Path) -> Iterator[str]:
    own, other = _tokens(ours), _tokens(theirs)
    if not own or not other:
        return
    unknown = [token for token in other if token not in own]
    moved = [token for token in other if token in own and own[token] != other[token]]
    if unknown:
        yield f"its tokenizer has {len(unknown)} tokens that the base's lacks, such as {quoted(unknown[-1])}"
    if moved:
        yield f"its tokenizer gives {len(moved)} tokens other numbers than the base's, such as {quoted(moved[0])}"


def _tokens(folder: Path) -> dict[str, Any]:
    """Token to number, of a tokenizer in one file."""
    content = _read(folder / "tokenizer.json")
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # pairs of a token and its score
        vocabulary = {str(pair[0]): number for number, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    tokens = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            tokens[token["content"]] = token.get("id")
    return tokens


def _templates(ours: Path, theirs: Path) -> Iterator[str]:
    own, other = _template(ours), _template(theirs)
    if other and own != other:
        yield f"its chat template is not the base's{'' if own else ', which has none'}"


def _template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return str(_read(folder / "tokenizer_config.json").get("chat_template") or "").strip()
