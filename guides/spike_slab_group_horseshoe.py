"""The guide of SS-GHS."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_sparse.models import SparseModel
from pyro_sparse.models.base import positive

from .base import SpikeSlabGuide, key
from .families import LogNormalFamily

__all__ = ["SpikeSlabGroupHorseshoe"]


class SpikeSlabGroupHorseshoe(SpikeSlabGuide):
    r"""Guide of :class:`pyro_sparse.models.SpikeSlabGroupHorseshoe`.

    Spike-and-slab on the non-centred rows, and mean-field log-normals on the two factors of each
    squared half-Cauchy scale.

    :param initial_local_scale: initial median of every τ_j; s starts at 1.
    :param initial_log_scale: initial standard deviation of the factors' logs.

    Further parameters: see :class:`~pyro_sparse.guides.base.SpikeSlabGuide`.
    """

    def __init__(
        self,
        model: SparseModel,
        *,
        initial_local_scale: float = math.exp(-1),
        initial_log_scale: float = 0.1,
        **shared: Any,
    ) -> None:
        super().__init__(model, **shared)
        positive(initial_local_scale=initial_local_scale, initial_log_scale=initial_log_scale)
        template = model.slab_scale
        self.global_scale = LogNormalFamily(
            torch.zeros_like(template).expand(2), initial_log_scale, event_dim=1
        )
        self.local_scale: Any = nn.ModuleDict()  # LogNormalFamily by group
        for group in self._groups:
            if group.prunable:
                # τ² = a b: the logs of both factors start at log τ.
                start = torch.full_like(template, math.log(initial_local_scale))
                start = start.expand(group.size, 2)
                self.local_scale[key(group)] = LogNormalFamily(
                    start, initial_log_scale, event_dim=1
                )
        # Gauss–Hermite nodes for E ρ̃: log ρ is Gaussian under q.
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        self._nodes = torch.from_numpy(nodes)
        self._weights = torch.from_numpy(weights / weights.sum())
        self._regularised = model.regularised
        self.match_network()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        pyro.sample("global_scale", self.global_scale())
        local_scale = self.local_scale
        for group, family in self.layers():
            if group.prunable:
                self.sample_units(f"{group.name}.local_scale", group.name, local_scale[key(group)])
            self.sample_rows(group, family)
        self.sample_rest()

    def scales(self) -> dict[str, Tensor]:
        r"""E ρ̃ by quadrature over :math:`\log ρ ∼ N(\tfrac12 Σ m, \tfrac14 Σ s²)` (4 factors)."""
        scales = {}
        s_mean, s_variance = self.global_scale.log_moments()
        for group in self._groups:
            if group.prunable:
                mean, variance = self.local_scale[key(group)].log_moments()
                loc = 0.5 * (s_mean.sum(-1) + mean.sum(-1))
                scale = 0.5 * (s_variance.sum(-1) + variance.sum(-1)).sqrt()
                nodes = self._nodes.to(loc)
                log_rho = loc.unsqueeze(-1) + scale.unsqueeze(-1) * nodes
                scales[group.name] = self._regularised(log_rho) @ self._weights.to(loc)
        return scales
