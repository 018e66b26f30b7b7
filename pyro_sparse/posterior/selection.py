"""Selection rules: small objects that turn a posterior into masks of units to keep.

A rule is called with a :class:`~pyro_sparse.posterior.Posterior` and returns a boolean mask
``(units,)`` for every group that the posterior may prune. To add one, write a class with
``__call__(posterior) -> dict[str, Tensor]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["MedianProbability", "SelectionRule"]


class SelectionRule(Protocol):
    """Anything that maps a posterior to ``{group: mask}``."""

    def __call__(self, posterior: Posterior) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class MedianProbability:
    """Keep the units with inclusion probability above a threshold, ½ by default.

    At ½ this is the median-probability model of Barbieri and Berger (Annals of Statistics 32,
    2004), which predicts best among single models under conditions they state.

    Raises:
        ValueError: the threshold is outside [0, 1).
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"expected a threshold in [0, 1), got {self.threshold}")

    def __call__(self, posterior: Posterior) -> dict[str, Tensor]:
        return {name: pip > self.threshold for name, pip in posterior.inclusion().items()}
