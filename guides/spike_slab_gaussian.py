"""The guide of SS-IG."""

from __future__ import annotations

from .base import SpikeSlabGuide

__all__ = ["SpikeSlabGaussian"]


class SpikeSlabGaussian(SpikeSlabGuide):
    r"""Guide of :class:`pyro_sparse.models.SpikeSlabGaussian`.

    .. math::
        \text{KL} = Σ_j \text{KL}(\text{Bern}(γ_j) ‖ \text{Bern}(λ_l))
          + Σ_j γ_j Σ_i \left[ \log\frac{σ_0}{σ_{ji}} + \frac{σ_{ji}² + μ_{ji}²}{2σ_0²}
          − \tfrac12 \right]

    Parameters: see :class:`~pyro_sparse.guides.base.SpikeSlabGuide`.
    """
