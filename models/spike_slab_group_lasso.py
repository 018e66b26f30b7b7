"""SS-GL: spike-and-slab group lasso."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_sparse.ranges import positive

from .base import SpikeSlabModel

__all__ = ["SpikeSlabGroupLasso"]


class SpikeSlabGroupLasso(SpikeSlabModel):
    r"""Spike-and-slab group lasso (SS-GL), non-centred.

    For unit ``j`` with a row of ``m`` numbers, and one :math:`ς²` for the whole network:

    .. math::
        ς² &∼ \text{Gamma}(c, d) \\
        τ_j² &∼ \text{Gamma}(\tfrac{m+1}{2}, \text{rate } ς²/2) \\
        z_j &∼ \text{Bernoulli}(λ_l), \qquad \tilde w_j ∼ N(0, σ_0² I) \\
        w_j &= z_j τ_j \tilde w_j.

    Integrating :math:`τ_j²` out leaves the slab :math:`∝ \exp(−ς ‖w_j‖_2 / σ_0)`: the group lasso's
    penalty. Sites: ``varsigma2``, ``{group}.tau2``, ``{group}.rows`` (:math:`z_j \tilde w_j`).

    Args:
        varsigma2_shape: ``c`` (4 in the authors' runs).
        varsigma2_rate: ``d`` (2 in the authors' runs).

    Further parameters: see :class:`~pyro_sparse.models.base.SpikeSlabModel`.
    Source: Jantre, Bhattacharya, Maiti, IEEE TNNLS 36(6) (2025), arXiv 2308.09104.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Tensor,
        *,
        varsigma2_shape: float = 4.0,
        varsigma2_rate: float = 2.0,
        **shared: Any,
    ) -> None:
        super().__init__(net, example, **shared)
        positive(varsigma2_shape=varsigma2_shape, varsigma2_rate=varsigma2_rate)
        self.register_constant("varsigma2_shape", varsigma2_shape)
        self.register_constant("varsigma2_rate", varsigma2_rate)

    def rows(self) -> dict[str, Tensor]:
        varsigma2 = pyro.sample("varsigma2", dist.Gamma(self.varsigma2_shape, self.varsigma2_rate))
        rows = {}
        for group in self.layers:
            if group.prunable:
                units, length = self.row_shape(group)
                shape = torch.full_like(varsigma2, (length + 1) / 2).expand(units)
                prior = self.support.law(group.name, dist.Gamma(shape, varsigma2 / 2))
                tau2 = pyro.sample(f"{group.name}.tau2", prior.to_event(1))
                rows[group.name] = self.spike_and_slab_rows(group) * tau2.sqrt().unsqueeze(-1)
            else:
                rows[group.name] = self.gaussian_rows(group)
        return rows
