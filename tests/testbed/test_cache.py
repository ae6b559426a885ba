"""The testbed's cache: built once, moved in one rename, remade when the recipe changes."""

import datasets
import pytest

from adamerge.testbed.cache import SPLITS, cached_splits, is_built


def splits(calls):
    def build():
        calls.append(1)
        for split in SPLITS:
            yield split, datasets.Dataset.from_dict({"text": [f"{split} {len(calls)}"]})

    return build


def test_the_second_call_reads_what_the_first_one_built(tmp_path):
    recipe, calls = tmp_path / "recipe.py", []
    recipe.write_text("one")
    first = cached_splits("words", [recipe], splits(calls), tmp_path / "cache")
    again = cached_splits("words", [recipe], splits(calls), tmp_path / "cache")
    assert len(calls) == 1 and tuple(again) == SPLITS
    assert first["test"]["text"][:] == again["test"]["text"][:] == ["test 1"]
    (folder,) = (tmp_path / "cache").iterdir()  # the stage was renamed, nothing else is left
    assert folder.name.startswith("words-")


def test_another_recipe_is_another_folder(tmp_path):
    recipe, calls = tmp_path / "recipe.py", []
    for text in ("one", "two"):
        recipe.write_text(text)
        data = cached_splits("words", [recipe], splits(calls), tmp_path / "cache")
    assert data["train"]["text"][:] == ["train 2"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_build_that_fails_leaves_nothing(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("one")

    def build():
        yield "train", datasets.Dataset.from_dict({"text": ["a"]})
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        cached_splits("words", [recipe], build, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_faster_process_wins_with_the_same_data(tmp_path):
    recipe, calls = tmp_path / "recipe.py", []
    recipe.write_text("one")

    def build():
        cached_splits("words", [recipe], splits(calls), tmp_path / "cache")  # another one finishes in between
        yield from ((split, datasets.Dataset.from_dict({"text": ["slow"]})) for split in SPLITS)

    data = cached_splits("words", [recipe], build, tmp_path / "cache")
    assert data["train"]["text"][:] == ["train 1"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_users_cache_folder_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    recipe = tmp_path / "recipe.py"
    recipe.write_text("one")
    cached_splits("words", [recipe], splits([]), None)
    assert [folder.parent for folder in (tmp_path / "home").glob("*/*/words-*")] == [tmp_path / "home/adamerge/testbed"]


def test_whether_it_is_built_is_asked_without_building(tmp_path):
    recipe, calls = tmp_path / "recipe.py", []
    recipe.write_text("one")

    def load():
        return cached_splits("words", [recipe], splits(calls), tmp_path / "cache")

    assert not is_built(load) and not calls and not (tmp_path / "cache").exists()
    load()
    assert is_built(load) and len(calls) == 1, "and building is allowed again"
