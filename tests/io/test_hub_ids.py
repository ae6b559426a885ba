"""Places: what looks like a path is a path, whether it exists or not, and the rest is an id on the Hub."""

import os

import pytest

from adamerge.io import hub_ids as places


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a folder ``data``, and nothing in it."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text", ["org/name", "org/name@main", "org/name@refs/pr/1", "a-b.c/d_e", "datum/cars", "org/v1.5"]
)
def test_ids(here, text):
    assert places.is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    [
        *("data/cars", "data/cars@main", "data"),
        *("./x", "../x", "~/x", "/abs/x", "/x", "x", "imdb", "json", "", "a/b/c", "a//b", "org/", "/"),
        *("org/x.jsonl", "org/x.JSONL.GZ", "org/x.csv", "org/x.tsv", "org/x.parquet", "org/x.txt", "org/x.safetensors"),
        *("a b/c", "org\\name", "nul\0/x"),
    ],
)
def test_paths_that_do_not_exist(here, text):
    assert not places.is_hub_id(text)


def test_what_exists_is_a_path(here):
    (here / "org" / "name").mkdir(parents=True)
    assert not places.is_hub_id("org/name") and not places.is_hub_id("org/other")
    (here / "one").symlink_to("nowhere")
    assert not places.is_hub_id("one")


def test_the_place_of_what_is_missing_is_told_whole(here):
    assert places.missing("data/cars") == f"there is no {here}/data/cars"
    assert places.missing("~/cars") == f"there is no {os.path.expanduser('~')}/cars"
    (here / "link.csv").symlink_to("gone.csv")
    assert places.missing("link.csv") == f"{here}/link.csv is a link to gone.csv, which does not exist"
