"""The guide of BMR."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.distributions import JointNormal
from pyro_sparse.models import ReducibleGaussian as Model
from pyro_sparse.ranges import positive

from .base import GroupGuide, Reducible, key
from .families import GaussianRows
from .offer import Offer

__all__ = ["ReducibleGaussian"]


class MeanFieldRows(GaussianRows):
    """Independent Gaussians on a layer's weights; the batch shape is ``(units, row length)``."""

    def forward(self) -> TorchDistributionMixin:
        law: Any = self.slab()
        return law.base_dist if self.variance_kind == "full" else dist.Normal(law.loc, law.scale)

    def variance(self) -> Tensor:
        return self.slab().variance


class JointRows(nn.Module):
    """One Gaussian on all weights of a layer, with a full covariance.

    Weights that it was conditioned away from are independent of the others from then on, whatever
    training does to the parameters: what is out must not be conditioned on twice.
    """

    inside: Tensor

    def __init__(self, rows: Tensor, scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(rows.detach().clone())
        self.log_diagonal = nn.Parameter(torch.full_like(rows.flatten(), math.log(scale)))
        self.below = nn.Parameter(torch.zeros(rows.numel(), rows.numel()).to(rows))
        self.register_buffer("inside", torch.ones_like(rows.flatten(), dtype=torch.bool))

    def scale_tril(self) -> Tensor:
        together = self.inside.unsqueeze(0) & self.inside.unsqueeze(1)
        return (self.below * together).tril(-1) + self.log_diagonal.exp().diag()

    def forward(self) -> TorchDistributionMixin:
        return JointNormal(self.loc, self.scale_tril())

    def covariance(self) -> Tensor:
        """``(units · row length, units · row length)``, the rows one after another."""
        factor = self.scale_tril()
        return factor @ factor.T

    def variance(self) -> Tensor:
        return self.scale_tril().square().sum(1).reshape(self.loc.shape)

    @torch.no_grad()
    def condition(self, kept: Tensor) -> None:
        """The law given that all weights outside ``kept`` are 0; those become independent.

        With the weights that go first, the scale's triangular factor is [[T, 0], [U, V]], and what
        is left given 0 has mean μ − U T⁻¹ μ₀ and scale V: no covariance is ever formed, whose
        condition would be the square of the factor's.
        """
        inside = kept.flatten()
        rest = self.inside & ~inside
        loc, scale = self.loc.double().flatten(), self.scale_tril().double()
        loc[~self.inside] = 0
        count = int(rest.sum())
        triangular = torch.linalg.qr(torch.cat([scale[rest], scale[inside]]).T).R.T
        triangular = triangular * triangular.diagonal().sign()  # columns; a positive diagonal
        gone = torch.linalg.solve_triangular(
            triangular[:count, :count], loc[rest].unsqueeze(1), upper=False
        )
        loc[inside] -= (triangular[count:, :count] @ gone).squeeze(1)
        loc[rest] = 0
        factor = torch.eye(len(loc), dtype=torch.float64, device=loc.device)
        index = inside.nonzero().squeeze(1)
        factor[index.unsqueeze(1), index] = triangular[count:, count:]
        self.loc.copy_(loc.reshape(self.loc.shape))
        self.log_diagonal.copy_(factor.diagonal().log())
        self.below.copy_(factor.tril(-1))
        self.inside.copy_(inside)


class ReducibleGaussian(GroupGuide):
    r"""Guide of :class:`pyro_sparse.models.ReducibleGaussian`: mean-field Gaussians.

    .. math:: q(w) = Π_{ji} N(w_{ji}; μ_{ji}, σ_{ji}²), \qquad q(β) = \text{Gamma}

    with β the noise precision of a :class:`~pyro_sparse.likelihoods.Normal` likelihood.

    Args:
        variance: ``"full"`` (one a weight), or another of
            :class:`~pyro_sparse.guides.families.GaussianRows`; the weights are independent in any
            case.
        initial_scale: initial σ of every weight.
        last_layer: ``"mean-field"``, or ``"joint"``: one Gaussian with a full covariance on all
            weights of the last layer, K·m numbers squared; affordable up to a few thousand weights.

    Raises:
        ValueError: for another ``last_layer``, one too large, or a scale out of range.
    """

    prior_variance: Tensor

    def __init__(
        self,
        model: Model,
        *,
        variance: str = "full",
        initial_scale: float = 0.1,
        last_layer: str = "mean-field",
    ) -> None:
        super().__init__(model)
        positive(initial_scale=initial_scale)
        if last_layer not in ("mean-field", "joint"):
            raise ValueError(f"expected last_layer 'mean-field' or 'joint', got {last_layer!r}")
        rows = model.initial_rows()
        last = self._groups[-1]
        if last_layer == "joint" and rows[last.name].numel() > 4000:
            raise ValueError(
                f"a full covariance on the {rows[last.name].numel()} weights of {last.name!r} "
                "would take their number squared; up to 4000 are allowed: use last_layer "
                "'mean-field'"
            )
        for group in self._groups:
            joint = group is last and last_layer == "joint"
            start = rows[group.name]
            self.row_families[key(group)] = (
                JointRows(start, initial_scale)
                if joint
                else MeanFieldRows(start, variance, initial_scale)
            )
        self.register_buffer("prior_variance", model.prior_scale.square())

    def offers(self) -> dict[str, Offer]:
        """With ``gaussians``: posterior and prior of every weight, :class:`Reducible` by group."""
        variances = {
            "row_variances": Offer(
                "posterior variance",
                lambda: {name: law.variance for name, law in self._gaussians().items()},
            )
        }
        return {"gaussians": Offer("Gaussian weights", self._gaussians), **variances}

    def _gaussians(self) -> dict[str, Reducible]:
        prior_variance = self.prior_variance.double()
        return {
            group.name: Reducible(
                family.loc.detach().double(),
                family.variance().detach().double(),
                prior_variance,
                family.covariance().detach().double() if isinstance(family, JointRows) else None,
            )
            for group, family in self.layers()
        }

    def reduced(self) -> None:
        for group, family in self.layers():
            if isinstance(family, JointRows) and not bool(self.support[group.name].all()):
                family.condition(self.support[group.name])
