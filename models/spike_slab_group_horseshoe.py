"""SS-GHS: spike-and-slab group horseshoe."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_sparse.distributions import HalfCauchyFactors

from .base import SpikeSlabModel, positive

__all__ = ["SpikeSlabGroupHorseshoe"]


class SpikeSlabGroupHorseshoe(SpikeSlabModel):
    r"""Spike-and-slab with a regularised group horseshoe slab (SS-GHS), non-centred.

    For unit ``j``, with one global scale ``s`` for the whole network:

    .. math::
        s &∼ C^+(0, τ_0), \qquad τ_j ∼ C^+(0, τ_1), \qquad ρ_j = s τ_j \\
        \tilde ρ_j &= c ρ_j / \sqrt{c² + ρ_j²} \\
        z_j &∼ \text{Bernoulli}(λ_l), \qquad \tilde w_j ∼ N(0, σ_0² I) \\
        w_j &= z_j \tilde ρ_j \tilde w_j.

    Each half-Cauchy is held as the two factors ``(a, b)`` of its square,
    :class:`~pyro_sparse.distributions.HalfCauchyFactors`, whose KL from log-normals is closed.
    Sites: ``global_scale``, ``{group}.local_scale`` (factors, last axis 2) and ``{group}.rows``
    (:math:`z_j \tilde w_j`).

    :param global_scale: :math:`τ_0`.
    :param local_scale: :math:`τ_1`.
    :param regularisation: ``c``, the largest scale a unit can have; ∞ gives the plain horseshoe.

    Further parameters: see :class:`~pyro_sparse.models.base.SpikeSlabModel`.
    Source: Jantre, Bhattacharya, Maiti, IEEE TNNLS 36(6) (2025), arXiv 2308.09104.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Tensor,
        *,
        global_scale: float = 1.0,
        local_scale: float = 1.0,
        regularisation: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(net, example, **shared)
        positive(global_scale=global_scale, local_scale=local_scale)
        if not regularisation > 0:
            raise ValueError(f"expected a positive regularisation, got {regularisation}")
        self.register_constant("global_scale", global_scale)
        self.register_constant("local_scale", local_scale)
        self.register_constant("regularisation", regularisation)

    def regularised(self, log_scale: Tensor) -> Tensor:
        r""":math:`\tilde ρ = ρ / \sqrt{1 + (ρ/c)²}` from log ρ, which may be large; c may be ∞."""
        excess = 2 * (log_scale - self.regularisation.log())
        return (log_scale - 0.5 * torch.logaddexp(excess, torch.zeros_like(excess))).exp()

    def rows(self) -> dict[str, Tensor]:
        s_factors = pyro.sample("global_scale", HalfCauchyFactors(self.global_scale))
        rows = {}
        for group in self.layers:
            if group.prunable:
                local = self.support.law(
                    group.name, HalfCauchyFactors(self.local_scale.expand(group.size))
                )
                tau_factors = pyro.sample(f"{group.name}.local_scale", local.to_event(1))
                # ρ = sqrt(s² τ²), from the four factors' logs
                log_rho = 0.5 * (s_factors.log().sum(-1) + tau_factors.log().sum(-1))
                scale = self.regularised(log_rho)
                rows[group.name] = self.spike_and_slab_rows(group) * scale.unsqueeze(-1)
            else:
                rows[group.name] = self.gaussian_rows(group)
        return rows
