"""Selections: the rules by hand, of scores with labels and of agreement without."""

import pytest

from adamerge.data.agreement import Divergence, SameClass
from adamerge.data.metrics import Accuracy, TokenLoss
from adamerge.errors import ConfigError
from adamerge.training.looks import Look
from adamerge.training.selection import HighestAgreement, HighestScore, LowestTarget


def look(scores, base=None, experts=None, weights=None, metric=None) -> Look:
    return Look(scores, base or {"a": 0.5, "b": 0.4}, experts or {}, weights or {}, metric or Accuracy())


def test_highest_score_is_relative_to_the_experts():
    """0.6 / 0.8 and 0.3 / 0.5: mean 0.675."""
    rule = HighestScore()
    assert rule.value(look({"a": 0.6, "b": 0.3}, experts={"a": 0.8, "b": 0.5})) == pytest.approx(0.675)
    assert rule.value(look({"a": 0.6, "b": 0.3}, experts={"a": 0.8})) == pytest.approx((0.75 + 0.75) / 2)
    less = look({"a": 2.0, "b": 4.0}, experts={"a": 1.0, "b": 1.0}, metric=TokenLoss())
    assert rule.value(less) == pytest.approx((0.5 + 0.25) / 2)


def test_lowest_target_respects_the_control():
    rule, weights = LowestTarget(share=0.95), {"a": -1.0}
    assert rule.value(look({"a": 0.1, "b": 0.4 * 0.951}, weights=weights)) == pytest.approx(-0.2)
    assert rule.value(look({"a": 0.1, "b": 0.4 * 0.949}, weights=weights)) is None
    assert rule.value(look({"a": 0.3, "b": 0.5}, weights=weights)) == pytest.approx(-0.6)
    nats = look({"a": 1.0, "b": 0.42}, weights=weights, metric=TokenLoss())  # of losses, more is worse
    assert rule.value(nats) == pytest.approx(-0.5)
    assert rule.value(look({"a": 1.0, "b": 0.43}, weights=weights, metric=TokenLoss())) is None


@pytest.mark.parametrize("weights", [{}, {"a": -1.0, "b": -1.0}])
def test_lowest_target_needs_targets_and_controls(weights):
    with pytest.raises(ConfigError, match="a task to forget and a task to keep"):
        LowestTarget().value(look({"a": 0.1, "b": 0.4}, weights=weights))


def agreed(scores, lost=None, metric=None) -> Look:
    return Look(scores, {}, dict.fromkeys(scores, 1.0), {}, metric or SameClass(), lost or dict.fromkeys(scores, 0.0))


def test_highest_agreement_is_the_mean_over_tasks():
    rule = HighestAgreement()
    assert rule.value(agreed({"a": 0.6, "b": 0.9})) == pytest.approx(0.75)
    assert rule.value(agreed({"a": 0.4, "b": 1.4}, metric=Divergence())) == pytest.approx(-0.9)


def test_a_task_may_not_lose_most_of_what_it_began_with():
    assert HighestAgreement().value(agreed({"a": 0.9, "b": 0.9}, {"a": -0.2, "b": 0.51})) is None
    assert HighestAgreement().value(agreed({"a": 0.9, "b": 0.9}, {"a": -0.2, "b": 0.49})) == pytest.approx(0.9)
    assert HighestAgreement(fall=0.6).value(agreed({"a": 0.9, "b": 0.9}, {"a": 0.0, "b": 0.59})) is not None


def test_no_step_is_chosen_by_agreement_with_what_a_fit_moves_away_from():
    with pytest.raises(ConfigError, match="moves away from task 'b'"):
        HighestAgreement().check(["a", "b"], {"b": -0.5})
    HighestAgreement().check(["a", "b"], {"b": 0.5})


def test_numbers_out_of_range_are_refused():
    for share in (0.0, 1.1):
        with pytest.raises(ConfigError, match="share"):
            LowestTarget(share)
        with pytest.raises(ConfigError, match="fall"):
            HighestAgreement(share)
