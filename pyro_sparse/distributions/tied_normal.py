"""A normal distribution of a matrix' rows whose scales factorise over rows and columns."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_sparse.distributions.analytic import normal_draw

__all__ = ["TiedNormal"]


class TiedNormal(TorchDistribution):
    r"""Normal vectors with :math:`w_i \sim N(\mu_i, σ_i^2)`, independent given u and v,

    .. math::
        σ_i^2 = Σ_{r=1}^k u_r^2 v_{ri}^2 .

    The column scales v are shared by all rows: K rows of length m need k (K + m) scales in place
    of K·m, and sums over a row's variances become k numbers times sums over v. With k = 1 that is
    the k-tied Normal of Swiatkowski et al. (ICML 2020), :math:`σ_i = u v_i`; for larger k theirs
    adds scales where this one adds variances, so that those of a layer's outputs stay k products.

    Args:
        loc: means μ, shape (..., m).
        row_scale: u > 0, shape (...), or (..., k) where ``column_scale`` is a matrix.
        column_scale: v > 0, shape (m,), or (k, m).

    Raises:
        ValueError: the shapes do not fit.
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        # Not by batch and event: these depend on the rank.
        "row_scale": constraints.positive,
        "column_scale": constraints.positive,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        row_scale: Tensor | float,
        column_scale: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        if not loc.is_floating_point():
            loc = loc.to(torch.get_default_dtype())
        row_scale = torch.as_tensor(row_scale, dtype=loc.dtype, device=loc.device)
        column_scale = column_scale.to(loc.dtype)
        if column_scale.dim() not in (1, 2) or loc.shape[-1:] != column_scale.shape[-1:]:
            raise ValueError(
                "TiedNormal needs loc (..., m) and column_scale (m,) or (k, m), got "
                + _shapes(loc, row_scale, column_scale)
            )
        rank = tuple(column_scale.shape[:-1])
        rows = tuple(row_scale.shape)
        if rank and rows[-1:] != rank:
            raise ValueError(
                f"TiedNormal of rank {rank[0]} needs row_scale (..., {rank[0]}), got "
                + _shapes(loc, row_scale, column_scale)
            )
        rows = rows[: len(rows) - len(rank)]
        batch_shape = loc.shape[:-1]
        if rows != batch_shape:
            try:
                batch_shape = torch.broadcast_shapes(batch_shape, rows)
            except RuntimeError as error:
                raise ValueError(
                    "TiedNormal needs row_scale to broadcast with the rows of loc, got "
                    + _shapes(loc, row_scale, column_scale)
                ) from error
            loc = loc.expand(batch_shape + loc.shape[-1:])
            row_scale = row_scale.expand(batch_shape + rank)
        self.loc, self.row_scale, self.column_scale = loc, row_scale, column_scale
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    @classmethod
    def from_logs(cls, loc: Tensor, row_log_scale: Tensor, column_log_scale: Tensor) -> TiedNormal:
        """With log u and log v, whose gradients then need no scale in between.

        Args:
            loc: μ, ``(..., m)``.
            row_log_scale: log u, ``(...)`` or ``(..., k)``.
            column_log_scale: log v, ``(m,)`` or ``(k, m)``.
        """
        new = cls.__new__(cls)
        new.loc = loc
        new.row_log_scale, new.column_log_scale = row_log_scale, column_log_scale
        TorchDistribution.__init__(new, loc.shape[:-1], loc.shape[-1:], validate_args=False)
        return new

    @lazy_property
    def row_scale(self) -> Tensor:
        """u."""
        return self.row_log_scale.exp()

    @lazy_property
    def column_scale(self) -> Tensor:
        """v."""
        return self.column_log_scale.exp()

    @lazy_property
    def row_log_scale(self) -> Tensor:
        """log u."""
        return self.row_scale.log()

    @lazy_property
    def column_log_scale(self) -> Tensor:
        """log v."""
        return self.column_scale.log()

    def expand(self, batch_shape: Any, _instance: Any = None) -> TiedNormal:
        new = self._get_checked_instance(TiedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        rank = () if self.rank is None else (self.rank,)
        new.row_log_scale = self.row_log_scale.expand(batch_shape + rank)
        new.column_log_scale = self.column_log_scale
        super(TiedNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def rank(self) -> int | None:
        """k, where the scales are matrices; None where they are vectors."""
        columns = self.__dict__.get("column_log_scale", self.__dict__.get("column_scale"))
        return None if columns is None or columns.dim() == 1 else len(columns)

    @property
    def scale(self) -> Tensor:
        """The scales σ as a matrix, shape (..., m)."""
        if self.rank is None:
            return self.row_scale.unsqueeze(-1) * self.column_scale
        return self.variance.sqrt()

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        if self.rank is None:
            return self.scale.square()
        return self.row_scale.square() @ self.column_scale.square()

    def variance_sums(self) -> Tensor:
        """Row sums of σ², shape (...)."""
        columns = (2 * self.column_log_scale).exp().sum(-1)
        rows = (2 * self.row_log_scale).exp()
        return rows * columns if self.rank is None else rows @ columns

    def log_scale_sums(self) -> Tensor:
        """Row sums of log σ, shape (...)."""
        if self.rank is None:
            return self.event_shape[0] * self.row_log_scale + self.column_log_scale.sum()
        return 0.5 * self.variance.log().sum(-1)

    def rsample(
        self,
        sample_shape: Any = torch.Size(),
        gate: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """A draw, each row of it multiplied by ``gate`` where given; of ``noise`` where given."""
        loc = self.loc.expand(self._extended_shape(sample_shape))
        noise = torch.randn_like(loc) if noise is None else noise
        if self.rank is None:
            return normal_draw(loc, noise, gate, self.row_log_scale, self.column_log_scale)
        draw = torch.addcmul(loc, self.scale, noise)
        return draw if gate is None else draw * gate.unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        standardised = (value - self.loc) / self.scale
        return -0.5 * standardised.square().sum(-1) - self._log_normaliser()

    def entropy(self) -> Tensor:
        return self._log_normaliser() + 0.5 * self.event_shape[0]

    def _log_normaliser(self) -> Tensor:
        return self.log_scale_sums() + 0.5 * self.event_shape[0] * math.log(2 * math.pi)


def _shapes(loc: Tensor, row_scale: Tensor, column_scale: Tensor) -> str:
    return (
        f"loc {tuple(loc.shape)}, row_scale {tuple(row_scale.shape)}, "
        f"column_scale {tuple(column_scale.shape)}"
    )
