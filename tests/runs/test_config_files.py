"""Configuration files: what cannot be read is told by its file; stages in the order of their numbers."""

import pytest

from adamerge.errors import ConfigError
from adamerge.runs.config_files import read_config, stages_of, with_texts


@pytest.mark.parametrize(
    ("text", "message"), [("", "no mapping"), ("- 1", "no mapping"), ("a: [", "not valid YAML"), (None, "no such")]
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_stages_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("10_j", *(f"{n}_x" for n in range(1, 10))):
        (tmp_path / f"{name}.yaml").write_text("a: 1")
    assert [path.stem for path in stages_of(tmp_path)] == [*(f"{n}_x" for n in range(1, 10)), "10_j"]
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="not a method of stages"):
        stages_of(tmp_path)


@pytest.mark.parametrize("text", ["name: 2024-02-30", "lr: !!float x", "a: &a [1, *a]"])
def test_what_yaml_itself_cannot_make_is_told_by_file(text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        read_config(tmp_path / "bad.yaml")


def test_paths_inside_a_run_are_where_it_is_now_in_its_stages_too(tmp_path):
    text = 'model: {start: "{this_run}/x", parts: ["{this_run}/y", 1, "{run}/z"]}\n"{this_run}/key": null\n'
    run, stage = tmp_path / "run", tmp_path / "run" / "1_first"
    stage.mkdir(parents=True)
    (run / "stages.json").write_text("{}")
    for moved in (run, tmp_path / "moved"):
        for path in ("1_first.yaml", "config.yaml", "1_first/config.yaml"):
            (run / path).write_text(text)
            run.rename(moved)
            assert read_config(moved / path) == {
                "model": {"start": f"{moved}/x", "parts": [f"{moved}/y", 1, "{run}/z"]}, "{this_run}/key": None,
            }  # fmt: skip
            moved.rename(run)


def test_texts_change_wherever_they_are_and_nothing_else():
    data = {"a": ["b", {"c": "d"}], "e": 1, "f": None, "g": True}
    assert with_texts(data, str.upper) == {"a": ["B", {"c": "D"}], "e": 1, "f": None, "g": True}


def test_what_is_done_to_a_files_content_is_not_there_at_the_next_read(tmp_path):
    text = "model: {experts: {a: x}, parts: [1, [2]]}"
    (tmp_path / "a.yaml").write_text(text)
    first = read_config(tmp_path / "a.yaml")
    first["model"]["experts"]["b"] = "y"
    first["model"]["parts"][1].clear()
    assert read_config(tmp_path / "a.yaml") == {"model": {"experts": {"a": "x"}, "parts": [1, [2]]}}
