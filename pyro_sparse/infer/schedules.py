"""Schedules: functions of training's progress in [0, 1], for learning rates and the KL's weight.

Each function here returns such a function; `fit` takes these or any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["LEARNING_RATES", "Schedule", "constant", "cosine", "linear", "rising"]

Schedule = Callable[[float], float]


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"expected {name} in [0, 1], got {value}")


def constant() -> Schedule:
    """1 throughout."""
    return lambda progress: 1.0


def linear(hold: float = 0.0) -> Schedule:
    """1 until ``hold``, then falling linearly to 0."""
    _fraction("hold", hold)
    return lambda progress: min(1.0, (1 - progress) / max(1 - hold, 1e-9))


def cosine(hold: float = 0.0) -> Schedule:
    """1 until ``hold``, then falling to 0 along half a cosine."""
    _fraction("hold", hold)
    fall = linear(hold)
    return lambda progress: 0.5 * (1 - math.cos(math.pi * fall(progress)))


def rising(start: float = 0.0, hold: float = 0.0, rise: float = 0.0) -> Schedule:
    """``start`` until ``hold``, then linear over the share ``rise`` of training up to 1.

    For the weight of the KL: while it is small, units break their symmetry by what they do for the
    likelihood; from ``hold + rise`` on, the objective is the evidence lower bound.

    Raises:
        ValueError: an argument is outside [0, 1], or ``hold + rise`` is.
    """
    for name, value in {
        "start": start,
        "hold": hold,
        "rise": rise,
        "hold + rise": hold + rise,
    }.items():
        _fraction(name, value)
    if rise == 0:
        return lambda progress: start if progress < hold else 1.0
    return lambda progress: start + (1 - start) * min(1.0, max(0.0, (progress - hold) / rise))


LEARNING_RATES: dict[str, Callable[[float], Schedule]] = {
    "constant": lambda hold: constant(),
    "cosine": cosine,
    "linear": linear,
}
"""By the names of the command line; each takes the share of training that is held at 1."""
