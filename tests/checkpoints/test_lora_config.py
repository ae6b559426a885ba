"""LoRA configurations: patterns match as peft matches them; what is no plain LoRA is tested with the adapters."""

import json

import pytest

from adamerge.checkpoints.lora_config import by_pattern, read_configuration
from adamerge.errors import CheckpointError

NAMES = ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "q_proj", "my_q_proj", "q_proj.x"]
PATTERNS = [
    "q_proj",
    "layers.1.self_attn.q_proj",
    r"layers\.\d+\.self_attn.q_proj",
    "^q_proj",
    "model.*",
    "proj",
    ".*attn.q_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern):
    from peft.utils.other import get_pattern_key

    for name in NAMES:
        theirs = {pattern: 3}.get(get_pattern_key([pattern], name), 8)
        assert by_pattern({"rank_pattern": {pattern: 3}}, "rank_pattern", name, 8) == theirs, name


def test_the_first_pattern_that_matches_decides():
    config = {"alpha_pattern": {"x": 1, "q_proj": 2, "a.q_proj": 3}}
    assert by_pattern(config, "alpha_pattern", "a.q_proj", 9) == 2
    assert by_pattern(config, "alpha_pattern", "v_proj", 9) == 9
    assert by_pattern({"alpha_pattern": None}, "alpha_pattern", "x", 9) == by_pattern({}, "alpha_pattern", "x", 9) == 9


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|aa)*b", ".*.*.*.*b", "a{4294967296}", "(" * 1500, "(" * 900 + ")" * 900, "q_proj(", "x" * 2000],
    ids=lambda pattern: pattern[:12],
)
def test_patterns_that_would_take_forever_or_are_none_are_refused(pattern):
    with pytest.raises(CheckpointError, match="rank_pattern has .* which is no pattern"):
        by_pattern({"rank_pattern": {pattern: 3}}, "rank_pattern", "a" * 60, 8)


@pytest.mark.parametrize("number", ["1" + "0" * 399, "-Infinity", "Infinity", "1e300", "-1e7"])
def test_numbers_that_would_overflow_are_refused(number, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": ' + number + "}")
    with pytest.raises(CheckpointError, match="lora_alpha or alpha_pattern is no number that fits"):
        read_configuration(path)


def test_what_it_says_is_read_and_errors_name_the_file(tmp_path):
    path = tmp_path / "adapter_config.json"
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 0.5, "rank_pattern": {}, "use_dora": False, "unknown_key": [1]}
    path.write_text(json.dumps(config))
    assert read_configuration(path) == config
    path.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json': use_dora is not supported: DoRA rescales"):
        read_configuration(path)
