"""What a fitted guide says of every unit, in one form for all guides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Offer"]


def _itself(law: Any) -> Any:
    return law


@dataclass(frozen=True)
class Offer:
    """One thing that a guide knows of units, such as their inclusion probabilities.

    :meth:`~pyro_sparse.guides.GroupGuide.offers` has all of a guide by name. What asks for units
    (rules, measures, figures, the command line) reads these and knows no guide.

    Attributes:
        title: of the measure, for figures and tables.
        read: gives by group the laws, or numbers, that the guide has now.
        measure: from a group's law to a number a unit, ``(units,)``; larger means: keep.
        cut: units above it are kept by default; None where this decides about no units.
        relative: whether the cut counts from the largest of the group.
        candidate: from a group's law to the units that may be kept at all, whatever the measure.
    """

    title: str
    read: Callable[[], Mapping[str, Any]]
    measure: Callable[[Any], Tensor] = _itself
    cut: float | None = None
    relative: bool = False
    candidate: Callable[[Any], Tensor] | None = None

    @property
    def laws(self) -> dict[str, Any]:
        """By group."""
        return dict(self.read())

    @property
    def values(self) -> dict[str, Tensor]:
        """The measure by group, ``(units,)`` each."""
        return {name: self.measure(law) for name, law in self.read().items()}

    def kept(self, cut: float | None = None) -> dict[str, Tensor]:
        """Masks of the units above a cut, by default this one's own."""
        cut = self.cut if cut is None else cut
        if cut is None:
            raise ValueError(f"the {self.title} has no cut of its own; pass one")
        masks = {}
        for name, law in self.read().items():
            value = self.measure(law)
            mask = value - (value.max() if self.relative else 0) > cut
            masks[name] = mask if self.candidate is None else mask & self.candidate(law)
        return masks
