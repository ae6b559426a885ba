"""A run's folder: whose a file is, and which of the paths in a text are inside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from adamerge.io.run_folder import movable, resolved, run_of

RUN = Path("/runs/n/a")


def test_a_files_run_is_its_folder_or_the_one_above_a_stage(tmp_path, monkeypatch):
    for folder in ("run/1_first/checkpoints", "plain"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "stages.json").write_text("{}")
    assert run_of(tmp_path / "plain" / "config.yaml") == tmp_path / "plain"
    for path in ("run/config.yaml", "run/1_first.yaml", "run/1_first/config.yaml", "run/1_first/../config.yaml"):
        assert run_of(tmp_path / path) == tmp_path / "run", path
    assert run_of(tmp_path / "plain" / "not" / "there" / "config.yaml") == tmp_path / "plain" / "not" / "there"
    monkeypatch.chdir(tmp_path / "run" / "1_first" / "checkpoints")
    for path in ("../config.yaml", "../../config.yaml"):
        assert run_of(Path(path)) == tmp_path / "run", path
    monkeypatch.chdir(tmp_path / "run" / "1_first")
    assert run_of(Path("config.yaml")) == tmp_path / "run"


def test_a_run_behind_a_link_goes_by_the_link_but_for_steps_back(tmp_path):
    (tmp_path / "far" / "a").mkdir(parents=True)
    (tmp_path / "far" / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    (tmp_path / "deep").symlink_to(tmp_path / "far" / "deep")
    assert run_of(tmp_path / "link" / "a" / "config.yaml") == tmp_path / "link" / "a"
    assert run_of(tmp_path / "deep" / ".." / "a" / "config.yaml") == tmp_path / "far" / "a"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("/runs/n/a/1_solve/x.safetensors", "{this_run}/1_solve/x.safetensors"),
        ("/runs/n/a", "{this_run}"),
        ("/models/base+/runs/n/a/adapter", "/models/base+{this_run}/adapter"),
        ("/runs/n/a/base+/runs/n/a/adapter", "{this_run}/base+{this_run}/adapter"),
        ("/runs/n/ab/x", "/runs/n/ab/x"),
        ("/runs/n/a+b/x", "/runs/n/a+b/x"),
        ("/mnt/runs/n/a/x", "/mnt/runs/n/a/x"),
        ("a photo of /runs/n/a/x", "a photo of /runs/n/a/x"),
        ("org/name@main", "org/name@main"),
    ],
)
def test_paths_inside_a_run_follow_it(text, written):
    assert movable(text, RUN) == written and resolved(written, RUN) == text
    assert resolved(written, Path("/b")) == written.replace("{this_run}", "/b")


@pytest.mark.parametrize("name", ["a.b", r"a\1", "a+b", "a(b", "{this_run}"])
def test_any_name_of_a_folder_is_taken_as_it_is(name):
    text = f"/runs/{name}/x"
    assert movable(text, Path("/runs") / name) == "{this_run}/x"
    assert resolved("{this_run}/x", Path("/runs") / name) == text
    assert movable("/runs/aXb/x", Path("/runs/a.b")) == "/runs/aXb/x"


def test_other_texts_with_braces_stay():
    for text in ("a photo of {}", "{run}/teachers", "x{this_run}/y", "{this_run}s", "{this_run} or that"):
        assert resolved(text, RUN) == text
