"""Renaming: prefixes are exchanged, never guessed: what fits two tensors or none is refused by name."""

import pytest

from adamerge.checkpoints.prefix_matching import Renaming
from adamerge.errors import CheckpointError

TEXT = [f"language_model.model.layers.{i}.q_proj.weight" for i in range(2)]
EYES = [f"vision_tower.encoder.layers.{i}.q_proj.weight" for i in range(2)]


def renamed(names, disk):
    renaming = Renaming("'adapter'", names, disk)
    return [renaming.find(name, "key") for name in names]


@pytest.mark.parametrize(
    ("ours", "theirs"), [("", ""), ("bert.", ""), ("", "bert."), ("model.a.", "a.model."), ("x.", "y.z.")]
)
def test_one_prefix_stands_for_another(ours, theirs):
    rests = ["layers.0.q.weight", "layers.1.q.weight", "layers.10.q.weight", "embed.tokens.weight"]
    disk = [theirs + rest for rest in rests] + ["other.weight", "layers_of.0.q.weight"]
    assert renamed([ours + rest for rest in rests], disk) == [theirs + rest for rest in rests]


def test_endings_are_whole_components():
    with pytest.raises(CheckpointError, match="is no tensor of the base"):
        renamed(["m.layers.0.q.weight"], ["sublayers.0.q.weight", "m.layers.00.q.weight"])


def test_the_one_exchange_that_fits_all_names_decides():
    names = ["model.language_model.layers.0.q_proj.weight", "model.language_model.layers.1.gate.weight"]
    disk = [*TEXT, *EYES, "language_model.model.layers.1.gate.weight"]
    assert renamed(names, disk) == [TEXT[0], "language_model.model.layers.1.gate.weight"]
    with pytest.raises(CheckpointError, match=r"'model\.language_model\.layers\.0\.q_proj\.weight' is several tensors"):
        renamed(names[:1], disk)


def test_a_block_number_is_never_dropped():
    with pytest.raises(CheckpointError, match="no tensor"):
        renamed(["layers.3.q_proj.weight"], ["q_proj.weight"])
    with pytest.raises(CheckpointError, match="no tensor"):
        renamed(["a.lm_head.weight"], ["weight"])


def test_other_names_follow_the_exchange_or_stay():
    disk = ["encoder.0.q.weight", "pooler.dense.weight", "dense.weight"]
    renaming = Renaming("'adapter'", ["bert.encoder.0.q.weight"], disk)
    assert renaming.find_if_there("bert.pooler.dense.weight") == "pooler.dense.weight"
    assert renaming.find_if_there("classifier.dense.weight") == "classifier.dense.weight"
    assert renaming.find_if_there("dense.weight") == "dense.weight"
    assert Renaming("'adapter'", [], disk).find_if_there("x.dense.weight") == "x.dense.weight"


def test_all_names_follow_one_exchange_and_a_head_of_its_own_stays():
    disk = ["encoder.0.q.weight", "encoder.1.q.weight", "embed.weight", "scale", "cls.dense.weight"]
    names = ["bert.encoder.0.q.weight", "bert.scale", "bert.encoder.7.q.weight", "head.dense.weight", "embed.weight"]
    assert Renaming("'expert'", names, disk).find_all() == {
        "encoder.0.q.weight": "bert.encoder.0.q.weight",
        "scale": "bert.scale",
        "bert.encoder.7.q.weight": "bert.encoder.7.q.weight",  # the disk has no such block
        "head.dense.weight": "head.dense.weight",  # ends as cls.dense.weight does, which no block of it tells
        "embed.weight": "embed.weight",
    }


def test_a_tower_is_told_by_what_it_has_alone():
    """On either side: a bare tower among two on disk, or two towers of which the disk has one."""
    blocks = [f"encoder.{i}.q.weight" for i in range(3)]
    eyes, text = [*blocks, "patches.weight", "places.weight"], [*blocks, "encoder.3.q.weight", "places.weight"]
    both = [*(f"eyes.{name}" for name in eyes), *(f"text.{name}" for name in text)]
    assert Renaming("'expert'", eyes, both).find_all() == {f"eyes.{name}": name for name in eyes}
    assert Renaming("'expert'", text, both).find_all() == {f"text.{name}": name for name in text}
    found = Renaming("'expert'", both, eyes).find_all()
    assert found == {name: f"eyes.{name}" for name in eyes} | {f"text.{name}": f"text.{name}" for name in text}
    for names, disk in ((blocks, both), ([*blocks, "places.weight"], both), (both, blocks)):
        with pytest.raises(CheckpointError, match="in several ways: '") as found:
            Renaming("'expert'", names, disk).find_all()
        assert "eyes.encoder.0.q.weight" in str(found.value) and "text.encoder.0.q.weight" in str(found.value)


def test_without_blocks_all_names_tell():
    disk = ["trunk.a.weight", "trunk.a.bias", "trunk.b.weight", "head.a.weight"]
    names = ["a.weight", "a.bias", "b.weight"]
    assert Renaming("'expert'", names, disk).find_all() == {f"trunk.{name}": name for name in names}
    assert Renaming("'expert'", ["other.thing", "more"], disk).find_all() == {
        "other.thing": "other.thing",
        "more": "more",
    }
    with pytest.raises(CheckpointError, match="several ways"):
        Renaming("'expert'", ["a.weight"], disk).find_all()


def test_the_disk_is_gone_through_once_however_many_names_there_are():
    """A mixture of experts has tens of thousands: their product would take minutes."""

    class Counted(dict):
        passes = 0

        def __iter__(self):
            Counted.passes += 1
            return super().__iter__()

    disk = Counted.fromkeys(
        f"model.layers.{i}.experts.{j}.{k}.weight" for i in range(4) for j in range(16) for k in "abc"
    )
    names = [name.removeprefix("model.") for name in dict(disk)]
    Counted.passes = 0
    assert Renaming("'expert'", names, disk).find_all().keys() == dict(disk).keys()
    assert Counted.passes == 1


def test_what_lacks_the_dropped_prefix_gets_no_other():
    names, disk = ["bert.encoder.0.q.weight", "dense.weight"], ["x.encoder.0.q.weight", "x.dense.weight"]
    found = Renaming("'expert'", names, disk).find_all()
    assert found == {"x.encoder.0.q.weight": "bert.encoder.0.q.weight", "dense.weight": "dense.weight"}
    assert Renaming("'adapter'", names[:1], disk).find_if_there("dense.weight") == "dense.weight"
