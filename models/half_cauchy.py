"""Half-Cauchy scales of units, shared by the horseshoes: SS-GHS and BC-GHS."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.distributions import HalfCauchyFactors
from pyro_sparse.ranges import positive

from .base import SparseModel

__all__ = ["HalfCauchyModel"]


class HalfCauchyModel(SparseModel):
    r"""Shared by SS-GHS and BC-GHS: a half-Cauchy scale of every unit.

    .. math::
        s &∼ C^+(0, τ_0), \qquad τ_j ∼ C^+(0, τ_1), \qquad ρ_j = s τ_j \\
        \tilde ρ_j &= c ρ_j / \sqrt{c² + ρ_j²}

    Each half-Cauchy is held as the two factors ``(a, b)`` of its square,
    :class:`~pyro_sparse.distributions.HalfCauchyFactors`, whose KL from log-normals is closed.

    Args:
        global_scale: :math:`τ_0`.
        local_scale: :math:`τ_1`.
        regularisation: ``c``, the largest scale a unit can have; ∞ gives the plain horseshoe.

    Further parameters: see :class:`~pyro_sparse.models.base.SparseModel`.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Tensor,
        *,
        global_scale: float,
        local_scale: float,
        regularisation: float,
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

    def sample_global_scale(self, site: str) -> Tensor:
        """The two factors of s², ``(2,)``."""
        law = self.fixed_law(site, lambda: HalfCauchyFactors(self.global_scale))
        return pyro.sample(site, law)

    def sample_scales(self, name: str, s_factors: Tensor) -> Tensor:
        r"""``{name}.local_scale`` given the factors of s²; :math:`\tilde ρ`, ``(units,)``."""

        def make() -> TorchDistributionMixin:
            local = HalfCauchyFactors(self.local_scale.expand(self.graph[name].size))
            return self.support.law(name, local).to_event(1)

        site = f"{name}.local_scale"
        tau_factors = pyro.sample(site, self.fixed_law(site, make))
        # ρ = sqrt(s² τ²), from the four factors' logs
        return self.regularised(0.5 * (s_factors.log().sum(-1) + tau_factors.log().sum(-1)))
