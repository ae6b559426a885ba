"""Settings in a model's files that reach a library: harmful ones are refused by file and name, before anything is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import build_open_clip_folder
from running import child
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import AttentionInterface

from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.export import export
from adamerge.backbones import OpenClipClassifier
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError
from adamerge.io.untrusted_settings import FILES, IMPLEMENTATIONS, LARGEST, RULES, refuse_harmful
from adamerge.parametrizations import TaskWise
from adamerge.task_vectors.task_vectors import TaskVectors

HARMFUL: dict[str, list[Any]] = {
    "trust_remote_code": [True, "yes", 1],
    "attn_implementation": ["kernels-community/flash-attn2", "evil/kernel@main:f", {"text_config": "evil/kernel"}, "mine"],
    "_attn_implementation_internal": ["evil/kernel"],
    "experts_implementation": ["evil/kernel"],
    "audio_tokenizer": [{"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "evil/model"}],
    "model_args": [{"checkpoint_path": "../x.pth"}, {"depth": 2, "pretrained": True}, {"a": {"pretrained_cfg": {}}}, "x"],
    "backbone_kwargs": [{"features_only": 1, "checkpoint_path": "x"}],
    "architecture": ["hf-hub:evil/model", "local-dir:/tmp/x", "../x", "a/b"],
    "backbone": ["hf_hub:evil/model"],
    "timm_model_name": ["hf-hub:evil/model", "local-dir:x"],
    "hf_model_name": ["../text", "/etc/model", "tests", "a/b/c", "hf-hub:a/b", ["a"]],
    "tokenizer_kwargs": [
        {"trust_remote_code": True}, {"bpe_path": "/etc/passwd"}, {"cache_dir": "x"}, {"tokenizer_type": "evil"},
        {"clean": 3}, {"additional_special_tokens": [{"a": 1}]}, {"padding_side": {"x": 1}}, "x",
    ],
}  # fmt: skip
HARMLESS: dict[str, list[Any]] = {
    "trust_remote_code": [False, None],
    "attn_implementation": [None, "eager", "sdpa", {"text_config": "sdpa", "vision_config": "eager"}],
    "experts_implementation": ["grouped_mm"],
    "audio_tokenizer": [None],
    "model_args": [None, {}, {"depth": 3, "img_size": [224, 224], "global_pool": None}],
    "backbone_kwargs": [{"out_indices": [1, 2]}],
    "architecture": ["resnet50.a1_in1k"],
    "backbone": ["resnet50", {"model_type": "resnet"}],
    "timm_model_name": ["vit_base_patch16_siglip_224"],
    "hf_model_name": ["roberta-base", "facebook/nllb-200-distilled-600M", None],
    "tokenizer_kwargs": [None, {}, {"clean": "canonicalize", "strip_sep_token": True, "model_max_length": 64}],
}


def test_every_rule_is_tried_in_both_ways():
    for table in (HARMFUL, HARMLESS):
        same = {key.lstrip("_").removesuffix("_internal") for key in table}
        assert same == {key.lstrip("_").removesuffix("_internal") for key in RULES}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("key", HARMFUL)
def test_what_is_harmful_is_refused_wherever_it_stands(file, key, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # where there is a folder "tests"
    for value in HARMFUL[key]:
        for content in ({key: value}, {"a": [{"b": {key: value}}]}):
            (tmp_path / file).write_text(json.dumps(content))
            with pytest.raises(CheckpointError, match=key) as caught:
                refuse_harmful(tmp_path)
            assert file in caught.value.what
    for value in HARMLESS.get(key, ()):
        (tmp_path / file).write_text(json.dumps({"a": [{"b": {key: value}}]}))
        refuse_harmful(tmp_path)


def test_a_file_that_nests_as_deep_as_json_goes_is_looked_through(tmp_path):
    content = '{"a": ' * 400 + '{"trust_remote_code": true}' + "}" * 400
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        refuse_harmful(tmp_path)


def test_what_only_others_can_read_is_refused_and_what_nobody_can_is_not(tmp_path):
    (tmp_path / "config.json").write_text('{"trust_remote_code": false, "trust_remote_code": true}')
    with pytest.raises(CheckpointError, match="a key occurs twice"):
        refuse_harmful(tmp_path)
    (tmp_path / "config.json").write_text('{"trust_remote_code": true')
    refuse_harmful(tmp_path)
    with (tmp_path / "config.json").open("w") as file:
        file.write("{" + " " * LARGEST + '"trust_remote_code": true}')
    with pytest.raises(CheckpointError, match="too big"):
        refuse_harmful(tmp_path)


def test_ways_of_attention_are_those_of_transformers_that_download_nothing():
    known = {name for name in AttentionInterface._global_mapping if "|" not in name}
    assert {"eager", *known} <= IMPLEMENTATIONS and not any("/" in name for name in IMPLEMENTATIONS)


@pytest.fixture
def folder(tmp_path):
    """An open_clip model with a tokenizer of transformers beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    build_open_clip_folder(tmp_path / "base")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "red": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "base"
    )
    edit(tmp_path / "base", hf_tokenizer_name="some/tokenizer", tokenizer_kwargs={"clean": "lower"})
    return tmp_path / "base"


def edit(folder: Path, **text: Any) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= text
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def hostile_tokenizer(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    code = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | code))
    (folder / "evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w')\nclass Evil: pass\n")


def by_arguments(folder: Path) -> None:
    hostile_tokenizer(folder)
    edit(folder, tokenizer_kwargs={"trust_remote_code": True})


@pytest.mark.parametrize(
    ("change", "file", "key"),
    [
        (by_arguments, "open_clip_config.json", "model_cfg.text_cfg.tokenizer_kwargs.trust_remote_code"),
        (hostile_tokenizer, "tokenizer_config.json", "auto_map"),
    ],
)
def test_no_code_of_an_open_clip_folder_is_run(change, file, key, folder):
    change(folder)
    for opened in (OpenClipClassifier, open_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            opened(str(folder))
        assert f"{folder / file}" in caught.value.what and f"'{key}'" in caught.value.what
    assert not (folder / "canary").exists() and not list(folder.rglob("__pycache__"))


LOADS = """
import sys
import open_clip
tokenizer = open_clip.get_tokenizer(f"local-dir:{sys.argv[1]}")
open_clip.create_model(f"local-dir:{sys.argv[1]}", require_pretrained=True)
print(tokenizer(["A red"], context_length=4).tolist())
"""


@pytest.mark.slow
def test_a_tokenizer_of_the_folder_is_used_and_exported(folder, tmp_path):
    backbone = OpenClipClassifier(str(folder))
    assert backbone.tokenizer(["A red"], context_length=4).tolist() == [[2, 3, 1, 1]]
    weights = load_file(folder / "open_clip_model.safetensors")
    moved = {name: value + 1 for name, value in weights.items() if name.startswith("visual.")}
    save_file(moved, tmp_path / "expert.safetensors")
    vectors = TaskVectors(str(folder), {"one": str(tmp_path / "expert.safetensors")}, include=["visual.*"])
    export(Coefficients(vectors, TaskWise(vectors), backbone.layout()), tmp_path / "merged")
    shutil.rmtree(folder)
    (tmp_path / "load.py").write_text(LOADS)
    done = child([tmp_path / "load.py", tmp_path / "merged"], tmp_path, timeout=100)
    assert done.returncode == 0 and done.stdout.strip().endswith("[[2, 3, 1, 1]]"), done.stderr[-2000:]
