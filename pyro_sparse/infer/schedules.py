"""Schedules: functions of training's progress in [0, 1], for learning rates and the KL's weight.

Each function here returns such a function; `fit` takes these or any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = [
    "LEARNING_RATES",
    "Schedule",
    "cheap",
    "constant",
    "cosine",
    "delayed",
    "linear",
    "ramp",
    "steps",
]

Schedule = Callable[[float], float]


def _ordered(hold: float, end: float) -> None:
    if not 0 <= hold <= end <= 1:
        raise ValueError(f"expected 0 ≤ hold ≤ end ≤ 1, got hold={hold} and end={end}")


def constant() -> Schedule:
    """1 throughout."""
    return lambda progress: 1.0


def linear(hold: float = 0.0, end: float = 1.0) -> Schedule:
    """1 until ``hold``, then falling linearly to 0 at ``end``; 0 from there on."""
    _ordered(hold, end)
    return lambda progress: min(1.0, max(0.0, (end - progress) / max(end - hold, 1e-9)))


def cosine(hold: float = 0.0, end: float = 1.0) -> Schedule:
    """1 until ``hold``, then falling to 0 at ``end`` along half a cosine; 0 from there on."""
    fall = linear(hold, end)
    return lambda progress: 0.5 * (1 - math.cos(math.pi * fall(progress)))


def steps(first: float = 0.5, second: float | None = None, factor: float = 0.1) -> Schedule:
    """1 until ``first``, ``factor`` until ``second``, and its square from there on.

    The schedule of residual networks: a tenth at one half and again at three quarters of training.
    ``second`` is half-way between ``first`` and the end where it is not given.
    """
    second = (1 + first) / 2 if second is None else second
    _ordered(first, second)
    return lambda progress: factor ** ((progress > first) + (progress > second))


def ramp(start: float = 0.0, hold: float = 0.0, change: float = 0.0) -> Schedule:
    """``start`` until ``hold``, then linear over the share ``change`` of training to 1.

    For the weight of the KL. While it is small, units break their symmetry by what they do for the
    likelihood; while it is above 1, units that a trained network needs little of are let go. From
    ``hold + change`` on, the objective is the evidence lower bound.

    Raises:
        ValueError: ``start`` is negative, or ``hold + change`` is outside [0, 1].
    """
    _ordered(hold, hold + change)
    if not 0 <= start < math.inf:
        raise ValueError(f"expected a start of at least 0, got {start}")
    if change == 0:
        return lambda progress: start if progress < hold else 1.0
    return lambda progress: start + (1 - start) * min(1.0, max(0.0, (progress - hold) / change))


def delayed(schedule: Schedule, start: float, change: float = 0.0) -> Schedule:
    """0 until ``start``, then rising linearly over the share ``change`` to ``schedule``.

    For the rate of the inclusion logits where the KL has its full weight from the first step: in
    the beginning every weight is dear and none is of use yet.
    """
    _ordered(start, start + change)

    def factor(progress: float) -> float:
        if progress >= start + change:
            return schedule(progress)
        return schedule(progress) * max(0.0, (progress - start) / max(change, 1e-9))

    return factor


def cheap(num_data: int) -> float:
    """A start for `ramp`: the KL weighs as much against each example as with 570 000.

    That is a weight of 0.1 on MNIST's 57 000 training examples, where it was set.
    What decides whether a unit is worth its KL is the KL's weight over the number of examples.
    """
    return min(1.0, num_data / 570_000)


LEARNING_RATES: dict[str, Callable[[float], Schedule]] = {
    "constant": lambda _: constant(),
    "cosine": cosine,
    "linear": linear,
    "steps": steps,
}
"""By the names of the command line; each takes the share of training that is held at 1."""
