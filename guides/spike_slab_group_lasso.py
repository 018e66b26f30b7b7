"""The guide of SS-GL."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_sparse.models import SparseModel

from .base import SpikeSlabGuide, key
from .families import LogNormalFamily

__all__ = ["SpikeSlabGroupLasso"]


class SpikeSlabGroupLasso(SpikeSlabGuide):
    r"""Guide of :class:`pyro_sparse.models.SpikeSlabGroupLasso`.

    Spike-and-slab on the non-centred rows, and mean-field log-normals

    .. math:: τ_j² ∼ \text{LogNormal}(m_{τ}, s_{τ}²), \qquad ς² ∼ \text{LogNormal}(m_ς, s_ς²).

    KL(τ² | ς²) is closed given ς², which is drawn once a step.

    :param initial_log_scale: initial standard deviation of :math:`\log τ²` and :math:`\log ς²`.

    Further parameters: see :class:`~pyro_sparse.guides.base.SpikeSlabGuide`.
    """

    def __init__(
        self, model: SparseModel, *, initial_log_scale: float = 0.1, **shared: Any
    ) -> None:
        super().__init__(model, **shared)
        # ς² starts at its prior mean c/d, τ² at 1.
        varsigma2 = (model.varsigma2_shape / model.varsigma2_rate).log()
        self.varsigma2 = LogNormalFamily(varsigma2, initial_log_scale)
        self.tau2 = nn.ModuleDict()
        for group in self._groups:
            if group.prunable:
                start = torch.zeros_like(varsigma2).expand(group.size)
                self.tau2[key(group)] = LogNormalFamily(start, initial_log_scale)
        self.match_network()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        pyro.sample("varsigma2", self.varsigma2())
        tau2 = self.tau2
        for group, family in self.layers():
            if group.prunable:
                pyro.sample(f"{group.name}.tau2", tau2[key(group)]())
            self.sample_rows(group, family)
        self.sample_rest()

    def scales(self) -> dict[str, Tensor]:
        """E τ = exp(m/2 + s²/8)."""
        scales = {}
        for group in self._groups:
            if group.prunable:
                mean, variance = self.tau2[key(group)].log_moments()
                scales[group.name] = (mean / 2 + variance / 8).exp()
        return scales
