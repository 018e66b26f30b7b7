"""A normal distribution of a matrix' rows whose scales factorise over rows and columns."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["TiedNormal"]


class TiedNormal(TorchDistribution):
    r"""Normal vectors with :math:`w_i \sim N(\mu_i, (u v_i)^2)`, independent given u and v.

    .. math::
        p(w) = \prod_{i=1}^m (2\pi)^{-1/2} (u v_i)^{-1} \exp\{-(w_i - \mu_i)^2 / (2 u^2 v_i^2)\}

    The column scales v are shared by all rows: K rows of length m need K + m scales in place
    of K·m, and sums over a row's variances become a scalar times one sum over v.

    Source: the k-tied Normal of Swiatkowski et al. 2020, with k = 1.

    :param loc: means μ, shape (..., m).
    :param row_scale: u > 0, shape (...).
    :param column_scale: v > 0, shape (m,).
    :raises ValueError: if the shapes do not fit.
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "row_scale": constraints.positive,
        "column_scale": constraints.independent(constraints.positive, 1),
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
        row_scale = torch.as_tensor(row_scale, dtype=loc.dtype, device=loc.device)
        shapes = (
            f"loc {tuple(loc.shape)}, row_scale {tuple(row_scale.shape)}, "
            f"column_scale {tuple(column_scale.shape)}"
        )
        if column_scale.dim() != 1 or loc.shape[-1:] != column_scale.shape:
            raise ValueError(f"TiedNormal needs loc (..., m) and column_scale (m,), got {shapes}")
        try:
            batch_shape = torch.broadcast_shapes(loc.shape[:-1], row_scale.shape)
        except RuntimeError as error:
            raise ValueError(
                f"TiedNormal needs row_scale to broadcast with the rows of loc, got {shapes}"
            ) from error
        self.loc = loc.expand(batch_shape + loc.shape[-1:])
        self.row_scale = row_scale.expand(batch_shape)
        self.column_scale = column_scale
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TiedNormal:
        new = self._get_checked_instance(TiedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.row_scale = self.row_scale.expand(batch_shape)
        new.column_scale = self.column_scale
        super(TiedNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def scale(self) -> Tensor:
        """The scales u·v_i as a matrix, shape (..., m)."""
        return self.row_scale.unsqueeze(-1) * self.column_scale

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * noise

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        standardised = (value - self.loc) / self.scale
        return -0.5 * standardised.square().sum(-1) - self._log_normaliser()

    def entropy(self) -> Tensor:
        return self._log_normaliser() + 0.5 * self.event_shape[0]

    def _log_normaliser(self) -> Tensor:
        size = self.event_shape[0]
        log_scales = size * self.row_scale.log() + self.column_scale.log().sum()
        return log_scales + 0.5 * size * math.log(2 * math.pi)
