"""Means and variances of what comes one after another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Moments"]


class Moments:
    """Running mean and variance of named tensors, float64 (Welford): no difference of large sums.

    Attributes:
        count: of the values that were added.
        mean: by name.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one more value of each name."""
        self.count += 1
        for name, value in values.items():
            value = value.detach().double()
            mean = self.mean.setdefault(name, torch.zeros_like(value))
            squares = self._squares.setdefault(name, torch.zeros_like(value))
            change = value - mean
            mean += change / self.count
            squares += change * (value - mean)

    def variance(self, name: str) -> Tensor:
        """Unbiased, of two or more values."""
        return self._squares[name] / (self.count - 1)
