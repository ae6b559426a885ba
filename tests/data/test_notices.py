"""Notices: what a fit tells of its data before it begins."""

from .test_base import Pictures, served


def test_what_a_fit_is_told_of_its_splits():
    data = served(Pictures(), calibration_samples=5)
    assert data.notices() == [
        f"{task}: calibration 20 (5 of them used), validation 7, test 11" for task in ("colours", "shapes")
    ]
    assert served(Pictures(), only=["shapes"]).notices() == ["shapes: calibration 20, validation 7, test 11"]
    papers = served(Pictures(), transductive=True, only=["shapes"]).notices()
    assert papers == ["shapes: calibration 11 (the test split's inputs, transductive), validation 7, test 11"]


def test_a_task_whose_expert_was_left_out_is_told_of():
    told = served(Pictures()).notices(["colours"])[2:]
    assert told == [
        "shapes: calibrated on, though no expert of that name is merged;"
        " --leave_out takes experts alone, --tasks narrows experts and data"
    ]
    assert len(served(Pictures(), only=["colours"]).notices(["colours"])) == 1
