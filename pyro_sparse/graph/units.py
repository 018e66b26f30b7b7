"""Units as labels: every entry of a value says which unit it belongs to.

An *atom* is the smallest thing that could be removed: one row of a weight, one entry of the input,
one channel of zeros that a shortcut pads with. Each value that flows through the network carries a
tensor of labels, one atom an entry; operations that only move entries are run *on the labels*.
Where two atoms meet (the two sides of an addition, the heads of an attention), they are tied: a
*unit* is a set of tied atoms, and :class:`Atoms` is their union-find.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["KEPT", "Atoms", "Blocked", "Value", "compressed"]

KEPT = -1
"""The label of entries that belong to no unit: they always stay."""
NO_REASON = np.iinfo(np.int64).max


class Atoms:
    """Atoms, the ties between them, and the reasons why some may not be removed.

    An atom is *loose* if it is finer than a unit is meant to be (an entry of the input or of a
    parameter that is used directly): operations may tie loose atoms together. Rows of weights are
    *firm*: an operation across firm units blocks them rather than tying all of them into one.
    """

    def __init__(self) -> None:
        self.parent = np.zeros(0, dtype=np.int64)
        # Of a unit, kept at the smallest of its atoms: whether one is firm, and the place of its
        # first reason in ``reasons``, large where there is none.
        self.is_firm = np.zeros(0, dtype=bool)
        self.why = np.zeros(0, dtype=np.int64)
        self.reasons: list[str] = []
        self._ties = 0

    def new(self, count: int, *, loose: bool = False) -> Tensor:
        """Labels of ``count`` new atoms, ``(count,)``."""
        start = len(self.parent)
        self.parent = np.concatenate([self.parent, np.arange(start, start + count)])
        self.is_firm = np.concatenate([self.is_firm, np.full(count, not loose)])
        self.why = np.concatenate([self.why, np.full(count, NO_REASON)])
        return torch.arange(start, start + count)

    def _roots(self, labels: np.ndarray) -> np.ndarray:
        roots = self.parent[labels]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                return roots
            roots = above

    def find(self, labels: Tensor) -> Tensor:
        """Each label's unit, as the smallest of its atoms; :data:`KEPT` stays."""
        values = labels.numpy()
        kept = values < 0
        if kept.all():
            return labels.clone()
        roots = self._roots(np.where(kept, 0, values).reshape(-1)).reshape(values.shape)
        return torch.from_numpy(np.where(kept, KEPT, roots))

    def tie(self, left: Tensor, right: Tensor) -> None:
        """Tie labels of the same shape entry by entry; none of them may be :data:`KEPT`."""
        a, b = left.reshape(-1).numpy(), right.reshape(-1).numpy()
        before = np.unique(self._roots(np.concatenate([a, b])))
        while len(a):
            a, b = self._roots(a), self._roots(b)
            differ = a != b
            a, b = a[differ], b[differ]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))
        after = self._roots(before)
        np.logical_or.at(self.is_firm, after, self.is_firm[before])
        np.minimum.at(self.why, after, self.why[before])
        self._ties += 1
        if self._ties % 64 == 0:  # chains stay short
            self.parent = self._roots(np.arange(len(self.parent)))

    def firm(self, labels: Tensor) -> Tensor:
        """Which labels' units have a firm atom."""
        roots = self.find(labels).numpy()
        if not len(self.parent):
            return torch.zeros(roots.shape, dtype=torch.bool)
        return torch.from_numpy((roots >= 0) & self.is_firm[np.maximum(roots, 0)])

    def block(self, labels: Tensor, reason: str) -> None:
        """The units of these labels may not be removed; a unit's first reason stays."""
        roots = np.unique(self.find(labels).numpy())
        roots = roots[roots >= 0]
        if len(roots):
            self.why[roots] = np.minimum(self.why[roots], len(self.reasons))
            self.reasons.append(reason)

    def blocked(self) -> Blocked:
        """The units that may not be removed, and why."""
        self.parent = self._roots(np.arange(len(self.parent)))
        return Blocked(self.why[self.parent], self.reasons)

    def tie_along(self, labels: Tensor, reason: str) -> Tensor:
        """One label for each row of ``labels`` ``(rows, entries)``, tying those of a row.

        A row with a :data:`KEPT` entry is kept as a whole, and blocks its units. Where this would
        tie several firm units into a single one, they are blocked instead.

        Returns:
            ``(rows,)``.
        """
        first = labels[:, 0].clone()
        if labels.shape[1] == 1 or bool((labels == labels[:, :1]).all()):
            return first
        kept = (labels < 0).any(1)
        if kept.any():
            self.block(labels[kept], reason)
            first[kept] = KEPT
        rows = labels[~kept]
        firm = rows[self.firm(rows)]
        before = len(self.find(firm).unique())
        state = self.parent.copy(), self.is_firm.copy(), self.why.copy()
        self.tie(rows, rows[:, :1].expand_as(rows))
        if before > 1 and len(self.find(firm).unique()) == 1:
            self.parent, self.is_firm, self.why = state
            self.block(labels, reason)
            return torch.full_like(first, KEPT)
        return first


class Blocked:
    """The units that may not be removed, each with its reason.

    Args:
        why: by unit, the place of its reason in ``reasons``; :data:`NO_REASON` where none.
    """

    def __init__(self, why: np.ndarray, reasons: list[str]) -> None:
        self.why, self.reasons = why, reasons

    def __len__(self) -> int:
        return int((self.why != NO_REASON).sum())

    def __contains__(self, unit: object) -> bool:
        return isinstance(unit, int) and bool(self.why[unit] != NO_REASON)

    def __getitem__(self, unit: int) -> str:
        return self.reasons[self.why[unit]]

    def among(self, units: Tensor) -> Tensor:
        """Which of these units, as labels, are blocked; :data:`KEPT` counts as blocked."""
        known = torch.from_numpy(self.why != NO_REASON)
        return (units < 0) | known[units.clamp(min=0)] if len(known) else units < 0


@dataclass(frozen=True)
class Value:
    """What is known of one tensor that flows through the network.

    shape: its shape.
    labels: atom of each entry, of as many dimensions, with size 1 where they do not vary.
    emission: the value that each entry has when its unit is excluded, likewise; of entries without
        a unit, their value where that is a constant. NaN where it depends on the data.
    open: atoms whose rows, multiplied by a number, multiply the units of this value by it.
    """

    shape: torch.Size
    labels: Tensor
    emission: Tensor
    open: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def units(self) -> bool:
        """Whether any entry belongs to a unit."""
        return bool((self.labels >= 0).any())

    def full_labels(self) -> Tensor:
        return self.labels.expand(self.shape)

    def full_emission(self) -> Tensor:
        return self.emission.expand(self.shape)

    def along(self, dim: int) -> tuple[Tensor, Tensor]:
        """Labels and emissions as ``(size of dim, everything else)``; the latter compressed."""
        size = self.shape[dim]
        parts = []
        for part in (self.labels, self.emission):
            shape = list(part.shape)
            shape[dim] = size
            parts.append(part.expand(shape).movedim(dim, 0).reshape(size, -1))
        return parts[0], parts[1]


def compressed(value: Tensor) -> Tensor:
    """``value`` with every dimension along which it is constant narrowed to size 1."""
    for dim in range(value.ndim):
        if value.shape[dim] > 1:
            first = value.narrow(dim, 0, 1)
            same = value == first
            if value.is_floating_point():
                same |= value.isnan() & first.isnan()
            if bool(same.all()):
                value = first
    return value.clone()
