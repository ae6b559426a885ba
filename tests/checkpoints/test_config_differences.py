"""What stands beside the weights: settings, tokens and templates in which an expert differs from its base."""

import json

import pytest
from safetensors.torch import save_file
from toys import toy_weights

from adamerge.checkpoints.config_differences import unlike
from adamerge.checkpoints.opening import open_checkpoint


@pytest.fixture
def folders(tmp_path):
    """A base's folder and an expert's, alike."""
    base, experts = toy_weights(("one",))
    for name, weights in (("base", base), ("expert", experts["one"])):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        write(tmp_path / name, "config.json", {"rms_norm_eps": 1e-5, "text_config": {"rope_theta": 1e4}})
        write(tmp_path / name, "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []})
        write(tmp_path / name, "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    return tmp_path / "base", tmp_path / "expert"


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def told(folders):
    return unlike(*map(open_checkpoint, folders))


def test_equal_files_are_not_told_of(folders):
    assert told(folders) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", {"rms_norm_eps": 1e-6}, ["config.json: rms_norm_eps is '1e-06', in the base '1e-05'"]),
        ("config.json", {"text_config": {"rope_theta": 1e6}}, ["text_config.rope_theta is '1000000.0', in the base"]),
        ("config.json", {"rope_theta": 5.0, "transformers_version": "4", "dtype": "bfloat16"}, []),
        (
            "tokenizer.json",
            {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<|im_end|>", "id": 2}]},
            ["has 1 tokens that the base's lacks, such as '<|im_end|>'"],
        ),
        ("tokenizer.json", {"model": {"vocab": [["b", -1.0], ["a", -2.0]]}}, ["gives 2 tokens other numbers"]),
        ("tokenizer.json", {"model": {"type": "new"}}, []),
        ("tokenizer_config.json", {"chat_template": "other"}, ["its chat template is not the base's"]),
        ("tokenizer_config.json", {}, []),
        ("config.json", "{", ["cannot be compared: .*config.json"]),
        ("config.json", {"rms_norm_eps": "\x1b[31mred"}, [r"rms_norm_eps is '\\x1b"]),
    ],
)
def test_what_differs_is_told(folders, name, content, words):
    import re

    write(folders[1], name, content)
    found = told(folders)
    assert len(found) == len(words) and all(re.search(word, note) for word, note in zip(words, found, strict=True)), (
        found
    )


def test_a_template_of_its_own_file_counts_and_a_base_without_one_is_told(folders):
    write(folders[1], "chat_template.jinja", "{{ messages }}\n")
    assert told(folders) == []
    (folders[0] / "tokenizer_config.json").unlink()
    assert told(folders) == ["its chat template is not the base's, which has none"]


def test_models_that_are_no_folders_of_their_own_have_nothing_to_compare(folders):
    base, expert = map(open_checkpoint, folders)
    assert unlike(base, base) == [] and unlike(base, open_checkpoint(toy_weights(("one",))[0])) == []
    assert unlike(open_checkpoint(toy_weights(("one",))[0]), expert) == []
