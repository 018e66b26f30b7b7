"""The guide of half-Cauchy scales, shared by the horseshoes: SS-GHS and BC-GHS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_sparse.models.half_cauchy import HalfCauchyModel
from pyro_sparse.ranges import positive

from .base import GroupGuide
from .families import LogNormalFamily

__all__ = ["HalfCauchyGuide"]


class HalfCauchyGuide(GroupGuide):
    r"""Shared by the guides of SS-GHS and BC-GHS: mean-field log-normal factors of the scales.

    Under it :math:`\log ρ_j ∼ N(\tfrac12 Σ m, \tfrac14 Σ s²)` over the two factors of s² and the
    two of τ_j². A subclass calls :meth:`make_scales` and writes :meth:`global_family`.
    """

    local_scale: Any  # LogNormalFamily by group

    def global_family(self, name: str) -> LogNormalFamily:
        """The factors of s² for the units of group ``name``."""
        raise NotImplementedError

    def make_scales(
        self,
        model: HalfCauchyModel,
        factors: Callable[[str, int], Tensor],
        initial_log_scale: float,
    ) -> None:
        """Families of every unit's τ²: for layers that may be pruned, and inputs that are.

        Args:
            factors: by name and size of a group the initial logs of its factors, ``(units, 2)``.
            initial_log_scale: initial standard deviation of the logs.
        """
        positive(initial_log_scale=initial_log_scale)
        self.local_scale = nn.ModuleDict()
        for name in self.scaled_groups(model):
            start = factors(name, model.graph[name].size)
            self.local_scale[name.replace(".", "/")] = LogNormalFamily(
                start, initial_log_scale, event_dim=1
            )
        # Gauss–Hermite nodes for E ρ̃: log ρ is Gaussian under q.
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        self._nodes = torch.from_numpy(nodes)
        self._weights = torch.from_numpy(weights / weights.sum())
        self._regularised = model.regularised

    def scaled_groups(self, model: HalfCauchyModel) -> list[str]:
        """Names of the groups whose units have a scale."""
        return [group.name for group in model.layers if group.prunable]

    def local_family(self, name: str) -> LogNormalFamily:
        """The factors of τ² of the units of group ``name``."""
        return self.local_scale[name.replace(".", "/")]

    def log_scale_moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and variance of log ρ, ``(units,)`` each."""
        s_mean, s_variance = self.global_family(name).log_moments()
        mean, variance = self.local_family(name).log_moments()
        return 0.5 * (s_mean.sum(-1) + mean.sum(-1)), 0.25 * (s_variance.sum(-1) + variance.sum(-1))

    def expected_scale(self, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        r""":math:`E f(\tilde ρ)`, ``(units,)``, by quadrature over log ρ."""
        loc, variance = self.log_scale_moments(name)
        log_rho = loc.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * self._nodes.to(loc)
        return function(self._regularised(log_rho)) @ self._weights.to(loc)

    def scales(self) -> dict[str, Tensor]:
        return {
            group.name: self.expected_scale(group.name, lambda scale: scale)
            for group in self._groups
            if group.prunable
        }

    def squared_scales(self) -> dict[str, Tensor]:
        return {
            group.name: self.expected_scale(group.name, torch.square)
            for group in self._groups
            if group.prunable
        }


def settled_factors(log_scale: Tensor, prior_scale: Tensor) -> Tensor:
    r"""Logs of the factors (a, b) with :math:`\sqrt{ab}` as given that have the least KL.

    The KL of two log-normals depends on how :math:`\log a + \log b = L` is split by
    :math:`−\log a + a/θ + 1/b` with :math:`θ` the squared scale of the half-Cauchy, which is least
    at :math:`1/a = 1/θ + e^{−L}`. An even split under a small θ would start at a KL of 1/θ.

    Args:
        log_scale: log of the scale, any shape.
        prior_scale: scale of the half-Cauchy.

    Returns:
        ``(..., 2)``.
    """
    both = 2 * log_scale
    first = -torch.logaddexp(-2 * prior_scale.log(), -both)
    return torch.stack([first, both - first], dim=-1)
