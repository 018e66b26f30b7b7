"""The guide of the dense baseline."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.models import Deterministic as Model

from .base import GroupGuide, key

__all__ = ["Deterministic"]


class PointRows(nn.Module):
    """A point mass on a layer's rows.

    Args:
        flat: whether the prior is, and has a density for a row, not for each weight: Pyro's KL
            of a point mass takes events as they are.
    """

    def __init__(self, rows: Tensor, flat: bool) -> None:
        super().__init__()
        self.loc = nn.Parameter(rows.detach().clone())
        self.flat = flat

    def forward(self) -> TorchDistributionMixin:
        if self.flat:
            return dist.Delta(self.loc, event_dim=1)
        return dist.Delta(self.loc).to_event(1)


class Deterministic(GroupGuide):
    """Guide of :class:`pyro_sparse.models.Deterministic`: a point mass on every weight."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        for name, rows in model.initial_rows().items():
            family = PointRows(rows, flat=model.prior_scale is None)
            self.row_families[key(model.graph[name])] = family
