"""SS-GHS: spike-and-slab group horseshoe."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import SpikeSlabModel
from .half_cauchy import HalfCauchyModel

__all__ = ["SpikeSlabGroupHorseshoe"]


class SpikeSlabGroupHorseshoe(HalfCauchyModel, SpikeSlabModel):
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

    Parameters: see :class:`~pyro_sparse.models.half_cauchy.HalfCauchyModel` and
    :class:`~pyro_sparse.models.base.SpikeSlabModel`.
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
        super().__init__(
            net,
            example,
            global_scale=global_scale,
            local_scale=local_scale,
            regularisation=regularisation,
            **shared,
        )

    def rows(self) -> dict[str, Tensor]:
        s_factors = self.sample_global_scale("global_scale")
        rows = {}
        for group in self.layers:
            if group.prunable:
                scale = self.sample_scales(group.name, s_factors)
                rows[group.name] = self.spike_and_slab_rows(group) * scale.unsqueeze(-1)
            else:
                rows[group.name] = self.gaussian_rows(group)
        return rows
