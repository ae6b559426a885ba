"""Telling a plan: what is printed is what is recorded, for every copy and storage."""

import json

from adamerge.merging.block_copy import BlockCopy
from adamerge.merging.copies import WholeCopy
from adamerge.merging.memory_report import print_plan
from adamerge.merging.sharded_copy import ShardedCopy
from adamerge.task_vectors.memory import Available, size
from adamerge.task_vectors.storage import Disk
from merging.test_memory_plan import CUDA, planned, split
from merging.test_merged_model import files


def test_every_copy_is_told_in_words(tmp_path, capsys):
    vectors = files(tmp_path, 3, 32)
    for copy, processes in ((WholeCopy(), 1), (BlockCopy(), 1), (ShardedCopy(), 3)):
        plan = planned(vectors, storage=Disk(), copy=copy, processes=processes, units=split(vectors))
        print_plan(plan)
        text = " ".join(capsys.readouterr().out.split())
        record = json.loads(json.dumps(plan.record()))
        assert record["copy"] == str(copy) and record["processes"] == processes
        for key in ("merged_copy", "gradient", "running"):
            assert not record[key] or size(record[key]) in text
        assert record["running"] == plan.footprint.running and (str(copy) in text) == (type(copy) is not WholeCopy)
        assert ("in each of 3 processes" in text) == (processes == 3)
        assert ("before that the network is loaded" in text) == (type(copy) is not WholeCopy)


def test_the_record_and_the_table_say_the_same(tmp_path, capsys):
    plan = planned(files(tmp_path, 3, 32), device=CUDA, there=Available(1 << 33, 5000))
    record = json.loads(json.dumps(plan.record()))
    assert record["storage"] == "Pinned(float32)" or record["storage"] == "Disk()"
    assert record["available"] == {"host": 1 << 33, "device": 5000} and record["gradient"] == 4 * plan.sizes.merged
    assert set(record["predicted_peak"]) == set(map(str, plan.storages))
    print_plan(plan)
    text = capsys.readouterr().out
    assert "15 coefficients in 5 groups" in " ".join(text.split()) and "warning:" in text
    for storage in plan.storages:
        assert str(storage) in text and size(plan.peak(storage).device) in text


def test_many_micro_batches_are_a_warning_where_each_merges(tmp_path, capsys):
    vectors = files(tmp_path, 3, 32)
    for copy, micro_batch, warned in ((WholeCopy(), 1, False), (BlockCopy(), None, False), (BlockCopy(), 1, True)):
        print_plan(planned(vectors, copy=copy, units=split(vectors)), micro_batch)
        assert ("every micro-batch merges twice" in " ".join(capsys.readouterr().out.split())) == warned
