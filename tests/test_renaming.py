"""Renaming: prefixes are exchanged, never guessed: what fits two tensors or none is refused by name."""

import pytest

from adamerge.errors import CheckpointError
from adamerge.renaming import Renaming

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
