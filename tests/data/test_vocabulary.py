"""Vocabularies: as many classes as the tasks have, no class twice, one place for the class name in every template."""

import re
from importlib.resources import files

import pytest

from adamerge.data import Vocabulary, load_vocabulary, vocabularies
from adamerge.errors import ConfigError

CLASSES = {
    "sun397": 397,
    "cars": 196,
    "resisc45": 45,
    "eurosat": 10,
    "svhn": 10,
    "gtsrb": 43,
    "mnist": 10,
    "dtd": 47,
    "cifar100": 100,
    "stl10": 10,
    "flowers102": 102,
    "pets": 37,
    "pcam": 2,
    "fer2013": 7,
    "cifar10": 10,
    "food101": 101,
    "fashion_mnist": 10,
    "rendered_sst2": 2,
    "emnist_letters": 26,
    "emnist_digits": 10,
    "kmnist": 10,
}


def public_task(name):
    return name.removesuffix("_tall_masks").removesuffix("_fusion_bench")


def test_the_files_are_those_of_the_tasks_and_their_other_words():
    others = {name for name in vocabularies() if name not in CLASSES}
    assert CLASSES.keys() <= set(vocabularies()) and len(CLASSES) == 21
    assert {public_task(name) for name in others} < CLASSES.keys() and len(others) == 8


@pytest.mark.parametrize("name", vocabularies())
def test_a_vocabulary_is_complete(name):
    words = load_vocabulary(name)
    assert len(words.classnames) == CLASSES[public_task(name)]
    assert len(set(words.classnames)) == len(words.classnames) and len(set(words.templates)) == len(words.templates) > 0
    for word in (*words.classnames, *words.templates):
        assert isinstance(word, str) and word == word.strip() and word
    for template in words.templates:
        assert template.count("{}") == 1 and not re.search(r"[{}]", template.replace("{}", ""))
        assert template.format("red (2)") == template.replace("{}", "red (2)")


@pytest.mark.parametrize("name", vocabularies())
def test_a_file_names_its_sources_and_its_order(name):
    header = (
        (files("adamerge.data") / "vocabularies" / f"{name}.yaml").read_text(encoding="utf-8").split("classnames:")[0]
    )
    assert "# Words: " in header and "# Order: " in header
    assert all(line.startswith("# ") for line in header.splitlines())


def test_places_of_some_words():
    """Labels that the data sets' own documents give, so that a shifted list is found."""
    places = {
        "gtsrb": {14: "stop", 17: "red circle with white horizonal stripe no entry"},
        "eurosat": {0: "annual crop land", 1: "forest", 9: "lake or sea"},
        "flowers102": {0: "pink primrose", 72: "water lily", 101: "blackberry lily"},
        "flowers102_tall_masks": {0: "pink primrose", 72: "water lily", 101: "blackberry lily"},
        "cifar10": {0: "airplane", 6: "frog", 9: "truck"},
        "stl10": {2: "car", 7: "monkey"},
        "fashion_mnist": {7: "Sneaker", 9: "Ankle boot"},
        "cifar100": {26: "cra"},
        "cifar100_tall_masks": {25: "couch", 26: "crab", 27: "crocodile"},
        "fer2013": {4: "neutral", 5: "sad", 6: "surprised"},
        "fer2013_tall_masks": {
            4: "['sad', 'depressed']",
            5: "['surprised', 'shocked', 'spooked']",
            6: "['neutral', 'bored']",
        },
        "food101": {16: "cheesecake", 17: "cheese plate", 100: "waffles"},
        "food101_fusion_bench": {16: "cheese plate", 17: "cheesecake", 100: "waffles"},
        "emnist_letters": {0: "A", 25: "Z"},
        "cars": {0: "AM General Hummer SUV 2000", 195: "smart fortwo Convertible 2012"},
    }
    for name, expected in places.items():
        found = load_vocabulary(name).classnames
        assert {place: found[place] for place in expected} == expected
    for name in ("mnist", "svhn", "emnist_digits"):
        assert load_vocabulary(name).classnames == tuple("0123456789")
    for name in ("sun397", "resisc45", "dtd", "cifar100", "pets"):
        assert list(load_vocabulary(name).classnames) == sorted(load_vocabulary(name).classnames)


def test_other_words_are_in_the_same_order():
    """Where two lists of one task differ by spelling alone, the spelling gives the same order."""

    def plain(name):
        return [re.sub(r"[\W_]+", "", word).lower() for word in load_vocabulary(name).classnames]

    for name in ("pets", "food101", "fashion_mnist"):
        assert plain(name) == plain(f"{name}_tall_masks") and load_vocabulary(name) != load_vocabulary(
            f"{name}_tall_masks"
        )
    differing = [a for a, b in zip(plain("flowers102"), plain("flowers102_tall_masks"), strict=True) if a != b]
    assert differing == ["pinkyellowdahlia", "ballmoss"]
    assert load_vocabulary("kmnist_tall_masks").classnames[:3] == ("o", "ki", "su")
    assert load_vocabulary("kmnist").classnames[:3] == ("お", "き", "す")


def test_rows_as_experts_were_tuned_with_say_so():
    assert [name for name in vocabularies() if load_vocabulary(name).as_trained] == [
        "fer2013_tall_masks",
        "food101_fusion_bench",
    ]
    ours, theirs = (load_vocabulary(name).classnames for name in ("food101", "food101_fusion_bench"))
    assert [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b] == [16, 17]
    ours, theirs = (load_vocabulary(name).classnames for name in ("cifar100", "cifar100_tall_masks"))
    assert [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b] == [26]


def test_an_unknown_one_is_refused_with_the_nearest():
    assert isinstance(load_vocabulary("dtd"), Vocabulary)
    with pytest.raises(ConfigError, match=r"no vocabulary 'sun379'") as found:
        load_vocabulary("sun379")
    assert "did you mean 'sun397'?" in str(found.value)
    with pytest.raises(ConfigError, match="no vocabulary '../x'"):
        load_vocabulary("../x")
