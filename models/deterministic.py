"""The dense baseline: point estimates of all weights, nothing is ever excluded."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.graph import Group
from pyro_sparse.ranges import positive

from .base import SparseModel

__all__ = ["Deterministic"]


class Flat(dist.ImproperUniform):
    """An improper uniform prior whose log-density, 0, lies on the value's device."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value).to(value)


class Deterministic(SparseModel):
    r"""Dense network with point estimates (maximum likelihood, or maximum a posteriori).

    :math:`p(w) ∝ 1`, or :math:`w ∼ N(0, σ²)` with ``prior_scale`` σ, which is weight decay of
    strength :math:`1/(2σ²)` on the sum of squares. The guide is a point mass.

    Args:
        prior_scale: σ, or None for a flat prior.

    Further parameters: see :class:`~pyro_sparse.models.base.SparseModel`.
    """

    prunes = False
    not_taken: tuple[str, ...] = ("output_scale", "prune_inputs", "input_inclusion_probability")

    def __init__(
        self, net: nn.Module, example: Tensor, *, prior_scale: float | None = None, **shared: Any
    ) -> None:
        super().__init__(net, example, **shared)
        if prior_scale is not None:
            positive(prior_scale=prior_scale)
            self.register_constant("prior_scale", prior_scale)
        else:
            self.register_buffer("prior_scale", None)

    def point_rows(self, group: Group) -> Tensor:
        """``{group}.rows``, whose density is 1 or that of ``N(0, σ²)``."""

        def make() -> TorchDistributionMixin:
            units, length = self.row_shape(group)
            if self.prior_scale is None:
                prior: Any = Flat(dist.constraints.real_vector, (units,), (length,))
            else:
                zero = torch.zeros_like(self.prior_scale)
                prior = dist.Normal(zero, self.prior_scale).expand((units, length)).to_event(1)
            return self.support.law(group.name, prior).to_event(1)

        site = f"{group.name}.rows"
        return pyro.sample(site, self.fixed_law(site, make))

    def rows(self) -> dict[str, Tensor]:
        return {group.name: self.point_rows(group) for group in self.layers}
