"""The dense baseline: point estimates of all weights, nothing is ever excluded."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .base import SparseModel, positive

__all__ = ["Deterministic"]


class Flat(dist.ImproperUniform):
    """An improper uniform prior whose log-density, 0, lies on the value's device."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value).to(value)


class Deterministic(SparseModel):
    r"""Dense network with point estimates (maximum likelihood, or maximum a posteriori).

    :math:`p(w) ∝ 1`, or :math:`w ∼ N(0, σ²)` with ``prior_scale`` σ, which is weight decay of
    strength :math:`1/(2σ²)` on the sum of squares. The guide is a point mass.

    :param prior_scale: σ, or None for a flat prior.

    Further parameters: see :class:`~pyro_sparse.models.base.SparseModel`.
    """

    def __init__(
        self, net: nn.Module, example: Tensor, *, prior_scale: float | None = None, **shared: Any
    ) -> None:
        super().__init__(net, example, **shared)
        if prior_scale is not None:
            positive(prior_scale=prior_scale)
            self.register_constant("prior_scale", prior_scale)
        else:
            self.register_buffer("prior_scale", None)

    def rows(self) -> dict[str, Tensor]:
        rows = {}
        for group in self.layers:
            shape = self.row_shape(group)
            if self.prior_scale is None:
                prior = Flat(dist.constraints.real, shape, ())
            else:
                zero = torch.zeros_like(self.prior_scale)
                prior = dist.Normal(zero, self.prior_scale).expand(shape)
            law = self.support.law(group.name, prior.to_event(1))
            rows[group.name] = pyro.sample(f"{group.name}.rows", law.to_event(1))
        return rows
