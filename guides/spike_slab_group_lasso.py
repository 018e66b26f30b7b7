"""The guide of SS-GL."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_sparse.models import SparseModel
from pyro_sparse.ranges import positive

from .base import SpikeSlabGuide, key
from .families import LogNormalFamily

__all__ = ["SpikeSlabGroupLasso"]


class SpikeSlabGroupLasso(SpikeSlabGuide):
    r"""Guide of :class:`pyro_sparse.models.SpikeSlabGroupLasso`.

    Spike-and-slab on the non-centred rows, and mean-field log-normals

    .. math:: τ_j² ∼ \text{LogNormal}(m_{τ}, s_{τ}²), \qquad ς² ∼ \text{LogNormal}(m_ς, s_ς²).

    KL(τ² | ς²) is closed given ς², which is drawn once a step.

    Args:
        initial_tau2: initial median of every :math:`τ_j²`; that of ς² is where the prior mean of
            τ², :math:`(m+1)/ς²`, agrees with it.
        initial_log_scale: initial standard deviation of :math:`\log τ²` and :math:`\log ς²`.

    Further parameters: see :class:`~pyro_sparse.guides.base.SpikeSlabGuide`.
    """

    def __init__(
        self,
        model: SparseModel,
        *,
        initial_tau2: float = math.exp(-1),
        initial_log_scale: float = 0.1,
        **shared: Any,
    ) -> None:
        super().__init__(model, **shared)
        positive(initial_tau2=initial_tau2, initial_log_scale=initial_log_scale)
        prunable = [group for group in self._groups if group.prunable]
        template = torch.full_like(model.slab_scale, math.log(initial_tau2))
        lengths = [model.row_shape(group)[1] + 1 for group in prunable] or [1]
        varsigma2 = math.log(sum(lengths) / len(lengths)) - template
        self.varsigma2 = LogNormalFamily(varsigma2, initial_log_scale)
        self.tau2: Any = nn.ModuleDict()  # LogNormalFamily by group
        for group in prunable:
            start = template.expand(group.size)
            self.tau2[key(group)] = LogNormalFamily(start, initial_log_scale)
        self.match_network()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        gate = self.sample_gate()
        pyro.sample("varsigma2", self.varsigma2())
        tau2 = self.tau2
        for group, family in self.layers():
            if group.prunable:
                self.sample_units(f"{group.name}.tau2", group.name, tau2[key(group)]())
            self.sample_rows(group, family, gate)
        self.sample_likelihood()

    def scales(self) -> dict[str, Tensor]:
        """E τ = exp(m/2 + s²/8)."""
        scales = {}
        for group in self._groups:
            if group.prunable:
                mean, variance = self.tau2[key(group)].log_moments()
                scales[group.name] = (mean / 2 + variance / 8).exp()
        return scales

    def squared_scales(self) -> dict[str, Tensor]:
        """E τ² = exp(m + s²/2)."""
        squares = {}
        for group in self._groups:
            if group.prunable:
                mean, variance = self.tau2[key(group)].log_moments()
                squares[group.name] = (mean + variance / 2).exp()
        return squares
