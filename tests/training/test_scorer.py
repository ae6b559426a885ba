"""The scorer: base, experts and merged models with one network, in any order."""

from __future__ import annotations

import torch
from pico import TASKS
from running import LAYER_WISE
from runs.test_scoring import pool_file  # noqa: F401  # a fixture

from adamerge.merging.block_copy import BlockCopy
from adamerge.parametrizations import TaskWise
from adamerge.runs.instantiate import Configured
from adamerge.training.scorer import Scorer


def test_base_and_experts_may_be_asked_for_after_a_merge(pool_file):  # noqa: F811
    cli = Configured.of(["--config", str(pool_file), "--config", str(LAYER_WISE)])
    vectors, backbone = cli.model.merged.task_vectors, cli.model.merged.backbone
    scores = []
    for copy in (None, BlockCopy()):
        scorer = Scorer(backbone, cli.datamodule, vectors, "test", copy)
        first = scorer.base()
        scorer.merged(vectors, TaskWise)
        again = scorer.base()
        assert all(torch.equal(first[task], again[task]) for task in TASKS)
        scores.append({**again, **{f"expert {task}": value for task, value in scorer.experts().items()}})
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])
