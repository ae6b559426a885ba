"""Automatic: the fastest exact storage that fits, by hand, and placed as that one places."""

from functools import partial

import pytest
import torch
from merging.test_merged_model import Mlp, Net, files

from adamerge.errors import ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.automatic_storage import Automatic
from adamerge.task_vectors.memory import Available, Memory, Sizes
from adamerge.task_vectors.storage import Disk, Pinned, Resident

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_it_takes_the_fastest_exact_one_that_fits(tmp_path):
    sizes = Sizes.of(files(tmp_path, 3, 64))
    size = 4 * sizes.merged
    beside = Memory(device=2 * size)
    choose = partial(Automatic(margin=0.5).chosen, sizes, CUDA, beside=beside)
    lots = 1 << 40
    assert isinstance(choose(there=Available(lots, lots)), Resident)
    assert isinstance(choose(there=Available(lots, 2 * (4 + 2) * size)), Resident)
    assert isinstance(choose(there=Available(lots, 2 * (4 + 2) * size - 2)), Pinned)
    assert isinstance(choose(there=Available(2 * 5 * size, 2 * 5 * size)), Pinned)
    assert isinstance(choose(there=Available(2 * 5 * size - 8, 2 * 5 * size)), Disk)
    assert isinstance(choose(there=Available(lots, 0)), Disk)
    assert isinstance(choose(there=Available(None, None)), Resident)
    on_host = Automatic(margin=0.5).chosen(sizes, CPU, Available(2 * 5 * size - 8, 0), Memory(host=2 * size))
    assert isinstance(on_host, Disk)
    assert isinstance(Automatic(0.5).chosen(sizes, CPU, Available(2 * 5 * size, 0), Memory(host=2 * size)), Resident)
    chosen = [type(storage) for storage in Automatic().candidates(CUDA)]
    assert chosen == [Resident, Pinned, Disk] and {s.dtype for s in Automatic().candidates(CUDA)[:2]} == {"float32"}


def test_it_places_as_the_chosen_one_does_and_says_so_once(tmp_path, monkeypatch, caplog):
    vectors = files(tmp_path, 3, 16)
    for there, kind, word in ((1 << 40, "DenseDeltas", "Resident(float32)"), (1000, "StreamedDeltas", "Disk()")):
        monkeypatch.setattr(
            Available, "on", classmethod(lambda cls, device, processes=None, there=there: cls(there, 0))
        )
        caplog.clear()
        with caplog.at_level("INFO"):
            merged = MergedModel(Mlp(Net(16)), vectors, LayerWise(vectors))
            for _ in range(3):
                merged.merge()
        assert {type(deltas).__name__ for deltas in merged.task_vectors.values()} == {kind}
        assert [record.getMessage() for record in caplog.records if "storage: " in record.getMessage()] == [
            f"storage: {word}"
        ]


def test_a_margin_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"\[0, 1\), got 1.0"):
        Automatic(1.0)


def test_it_says_what_it_is():
    assert str(Automatic()) == "Automatic(0.2)"
