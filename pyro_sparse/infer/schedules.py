"""Schedules: functions of training's progress in [0, 1], for learning rates and the KL's weight.

Each function here returns such a function; `fit` takes these or any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["LEARNING_RATES", "Schedule", "cheap", "constant", "cosine", "linear", "ramp"]

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
}
"""By the names of the command line; each takes the share of training that is held at 1."""
