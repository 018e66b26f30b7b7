"""Schedules are functions of training's progress in [0, 1]."""

import math

import pytest

from pyro_sparse.infer import schedules


def values(schedule, *progress: float) -> list[float]:
    return [pytest.approx(schedule(value), abs=1e-12) for value in progress]


def test_constant():
    assert values(schedules.constant(), 0, 0.3, 1) == [1, 1, 1]


def test_linear():
    assert values(schedules.linear(), 0, 0.25, 1) == [1, 0.75, 0]
    assert values(schedules.linear(hold=0.5), 0, 0.5, 0.75, 1) == [1, 1, 0.5, 0]


def test_cosine():
    assert values(schedules.cosine(), 0, 0.5, 1) == [1, 0.5, 0]
    assert values(schedules.cosine(hold=0.4), 0, 0.4, 0.7, 1) == [1, 1, 0.5, 0]
    assert values(schedules.cosine(0.2, end=0.6), 0, 0.2, 0.4, 0.6, 1) == [1, 1, 0.5, 0, 0]


def test_ramp():
    schedule = schedules.ramp(0.1, hold=0.2, change=0.4)
    assert values(schedule, 0, 0.2, 0.4, 0.6, 1) == [0.1, 0.1, 0.55, 1, 1]
    assert values(schedules.ramp(0.1, hold=0.5), 0.49, 0.5, 1) == [0.1, 1, 1]
    assert values(schedules.ramp(), 0, 1) == [1, 1]


@pytest.mark.parametrize("hold", [0, 0.3, 1])
def test_held_throughout_or_not(hold):
    for name in schedules.LEARNING_RATES:
        schedule = schedules.LEARNING_RATES[name](hold)
        assert schedule(0) == pytest.approx(1)
        assert all(0 <= schedule(step / 20) <= 1 + 1e-12 for step in range(21))


@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_shares_lie_between_0_and_1(make, value):
    with pytest.raises(ValueError, match="expected 0 ≤ hold ≤ end ≤ 1, got"):
        make(value)


@pytest.mark.parametrize("value", [-0.1, math.inf, float("nan")])
def test_a_ramp_starts_at_a_weight(value):
    with pytest.raises(ValueError, match="expected a start of at least 0, got"):
        schedules.ramp(value)


def test_a_ramp_may_fall():
    schedule = schedules.ramp(30.0, hold=0.2, change=0.4)
    assert values(schedule, 0, 0.2, 0.4, 0.6, 1) == pytest.approx([30, 30, 15.5, 1, 1])


def test_hold_and_rise_are_shares_of_one_training():
    with pytest.raises(ValueError, match=r"got hold=0\.6 and end=1\.2"):
        schedules.ramp(hold=0.6, change=0.6)
