"""Rows whose columns are in or out with the inputs that they read."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Independent, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_sparse.distributions.log_scale_normal import LogScaleNormal
from pyro_sparse.distributions.tied_normal import TiedNormal

__all__ = ["GatedColumns"]


class GatedColumns(TorchDistribution):
    r"""Law of rows of weights given which columns are in, as a guide's :math:`q(w \mid z)`.

    .. math::
        w_{ji} \mid z_i = 1 ∼ N(μ_{ji}, σ_{ji}²), \qquad
        w_{ji} \mid z_i = 0 ∼ p(w_{ji}),

    independent of one another. The prior :math:`p` is the best law of a weight that multiplies a
    0: where :math:`z ∼ \text{Bernoulli}(γ)` independently, the divergence from it, averaged over
    z, is exact and charges what is in only,

    .. math:: E_z \text{KL}(q(w_j \mid z) ‖ p) = Σ_i γ_i \text{KL}(N(μ_{ji}, σ_{ji}²) ‖ p).

    That is what ``kl_divergence`` returns, with its gradient in γ: not the divergence at the drawn
    z, whose gradient in γ would be an estimate. Inside a
    :class:`~pyro_sparse.distributions.SpikeAndSlab` of units it is multiplied by the unit's own
    inclusion: a weight pays where both its unit and its input are in.

    Args:
        inside: law of the rows with all columns in: normal, batch shape ``(...)``, event shape
            ``(m,)``.
        outside: their prior, independent normals of the same shapes.
        columns: drawn inclusions z of the columns, ``(m,)``.
        probability: their probabilities γ, ``(m,)``.
    """

    arg_constraints = {"probability": constraints.unit_interval}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        inside: TorchDistribution,
        outside: TorchDistribution,
        columns: Tensor,
        probability: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.inside, self.outside = inside, outside
        self.columns, self.probability = columns, probability
        super().__init__(inside.batch_shape, inside.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GatedColumns:
        new = self._get_checked_instance(GatedColumns, _instance)
        batch_shape = torch.Size(batch_shape)
        new.inside, new.outside = (law.expand(batch_shape) for law in (self.inside, self.outside))
        new.columns, new.probability = self.columns, self.probability
        super(GatedColumns, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Given that all columns are in."""
        return self.inside.mean

    @property
    def variance(self) -> Tensor:
        """Given that all columns are in."""
        return self.inside.variance

    def log_scale(self) -> Tensor:
        """log σ of a column that is in, ``(..., m)``."""
        law: Any = self.inside
        if isinstance(law, TiedNormal):
            if law.rank is None:
                return law.row_log_scale.unsqueeze(-1) + law.column_log_scale
            return 0.5 * law.variance.log()
        base = law.base_dist
        log_scale: Tensor = base.log_scale if isinstance(base, LogScaleNormal) else base.scale.log()
        return log_scale

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        inside, outside = (law.rsample(sample_shape) for law in (self.inside, self.outside))
        return torch.where(self.columns > 0.5, inside, outside)

    def log_prob(self, value: Tensor) -> Tensor:
        inside = Normal(self.inside.mean, self.log_scale().exp(), validate_args=False)
        outside: Any = self.outside
        assert isinstance(outside, Independent)
        logs = torch.where(
            self.columns > 0.5, inside.log_prob(value), outside.base_dist.log_prob(value)
        )
        return logs.sum(-1)

    def kl_from(self, prior: torch.distributions.Normal) -> Tensor:
        """The divergence from normals of the shape of the rows, averaged over z, ``(...)``."""
        log_ratio = self.log_scale() - prior.scale.log()
        moment = (2 * log_ratio).exp() + ((self.inside.mean - prior.loc) / prior.scale).square()
        return (0.5 * (moment - 1) - log_ratio) @ self.probability
