"""SS-IG: spike-and-slab with an independent Gaussian slab."""

from __future__ import annotations

from torch import Tensor

from .base import SpikeSlabModel

__all__ = ["SpikeSlabGaussian"]


class SpikeSlabGaussian(SpikeSlabModel):
    r"""Spike-and-slab group prior with an independent Gaussian slab (SS-IG).

    For unit ``j`` of layer ``l``, with its incoming weights and bias as the row :math:`w_j`:

    .. math::
        z_j &∼ \text{Bernoulli}(λ_l) \\
        w_j \mid z_j = 1 &∼ N(0, σ_0² I), \qquad w_j \mid z_j = 0 = 0.

    Layers that are never pruned (the output) have :math:`w ∼ N(0, σ_{out}² I)`.
    Parameters: see :class:`~pyro_sparse.models.base.SpikeSlabModel`.

    Source: Jantre, Bhattacharya, Maiti, Neural Networks 167 (2023), arXiv 2108.11000.
    """

    def rows(self) -> dict[str, Tensor]:
        return {
            group.name: self.spike_and_slab_rows(group)
            if group.prunable
            else self.gaussian_rows(group)
            for group in self.layers
        }
