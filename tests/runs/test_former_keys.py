"""Former keys: files and words of earlier versions say the same under today's."""

import pytest

from adamerge.runs.former_keys import FORMER_KEYS, renewed_key, renewed_keys
from adamerge.runs.overrides import overridden


@pytest.mark.parametrize(
    ("former", "today"),
    [
        ("model.lr", "model.search.lr"), ("model.optimizer.momentum", "model.search.optimizer.momentum"),
        ("search", "model.search.class_path"), ("model.lr_scheduler", "model.search.schedule"),
        ("model.lrr", "model.lrr"), ("model.search.lr", "model.search.lr"), ("tasks+", "tasks+"), ("data.lr", "data.lr"),
    ],
)  # fmt: skip
def test_a_key(former, today):
    assert renewed_key(former) == today


def test_a_file_of_a_former_search():
    old = {"search": "adamerge.Bilevel", "model": {"lr": 0.1, "inner_lr_scheduler": None, "hold": True}, "tasks": ["a"]}
    search = {"class_path": "adamerge.Bilevel", "init_args": {"lr": 0.1, "inner_schedule": None}}
    assert renewed_keys(old) == {"model": {"hold": True, "search": search}, "tasks": ["a"]}


def test_files_of_today_are_left_alone():
    new = {"model": {"search": {"class_path": "adamerge.Descent", "init_args": {"lr": 0.1}}}}
    assert (
        renewed_keys(new) == new and renewed_keys({}) == {} and renewed_keys({"model": "a.yaml"}) == {"model": "a.yaml"}
    )
    assert renewed_keys({"search": None, "model": {}}) == {"model": {}}


@pytest.mark.parametrize("former", FORMER_KEYS)
def test_a_file_and_a_word_say_the_same(former):
    content, value = {"model": {}}, "adamerge.Bilevel" if former == "search" else "x"
    file = renewed_keys(overridden(content, [f"--{former}={value}"]))
    assert file == overridden(content, [f"--{renewed_key(former)}={value}"])
