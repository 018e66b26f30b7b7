"""The guide of the dense baseline."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.models import SparseModel

from .base import GroupGuide, key

__all__ = ["Deterministic"]


class PointRows(nn.Module):
    """A point mass on a layer's rows."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(rows.detach().clone())

    def forward(self) -> TorchDistributionMixin:
        return dist.Delta(self.loc).to_event(1)


class Deterministic(GroupGuide):
    """Guide of :class:`pyro_sparse.models.Deterministic`: a point mass on every weight."""

    def __init__(self, model: SparseModel) -> None:
        super().__init__(model)
        for name, rows in model.initial_rows().items():
            self.row_families[key(model.graph[name])] = PointRows(rows)
