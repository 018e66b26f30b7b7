"""The guide of SS-GHS."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch

from pyro_sparse.models import SpikeSlabGroupHorseshoe as Model
from pyro_sparse.ranges import positive

from .base import SpikeSlabGuide
from .families import LogNormalFamily
from .half_cauchy import HalfCauchyGuide

__all__ = ["SpikeSlabGroupHorseshoe"]


class SpikeSlabGroupHorseshoe(HalfCauchyGuide, SpikeSlabGuide):
    r"""Guide of :class:`pyro_sparse.models.SpikeSlabGroupHorseshoe`.

    Spike-and-slab on the non-centred rows, and mean-field log-normals on the two factors of each
    squared half-Cauchy scale.

    Args:
        initial_local_scale: initial median of every τ_j; s starts at 1.
        initial_log_scale: initial standard deviation of the factors' logs.

    Further parameters: see :class:`~pyro_sparse.guides.base.SpikeSlabGuide`.
    """

    def __init__(
        self,
        model: Model,
        *,
        initial_local_scale: float = math.exp(-1),
        initial_log_scale: float = 0.1,
        **shared: Any,
    ) -> None:
        super().__init__(model, **shared)
        positive(initial_local_scale=initial_local_scale)
        zero = torch.zeros_like(model.slab_scale)
        # τ² = a b: the logs of both factors start at log τ.
        start = zero + math.log(initial_local_scale)
        self.make_scales(model, lambda name, size: start.expand(size, 2), initial_log_scale)
        self.global_scale = LogNormalFamily(zero.expand(2), initial_log_scale, event_dim=1)
        self.match_network()

    def global_family(self, name: str) -> LogNormalFamily:
        return self.global_scale

    def forward(self, *args: Any, **kwargs: Any) -> None:
        gate = self.sample_gate()
        pyro.sample("global_scale", self.global_scale())
        for group, family in self.layers():
            if group.prunable:
                scale = self.local_family(group.name)
                self.sample_units(f"{group.name}.local_scale", group.name, scale())
            self.sample_rows(group, family, gate)
        self.sample_likelihood()
