"""The half-Cauchy distribution as a product of two factors that mean-field guides can fit."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Gamma, InverseGamma, constraints
from torch.distributions.utils import lazy_property

from pyro_sparse.distributions.analytic import broadcast_floating

__all__ = ["HalfCauchyFactors"]


class HalfCauchyFactors(TorchDistribution):
    r"""Two positive factors (a, b) with :math:`\sqrt{ab} \sim C^+(0, \text{scale})`.

    .. math::
        a \sim \mathrm{Gamma}(1/2, \text{rate } \text{scale}^{-2}), \qquad
        b \sim \mathrm{InverseGamma}(1/2, 1), \qquad
        p(a, b) = \frac{e^{-a / \text{scale}^2 - 1 / b}}{\pi\, \text{scale}\, a^{1/2}\, b^{3/2}}

    The event is the vector (a, b), shape (2,). Its KL from a pair of log-normals is in closed form,
    which that of a half-Cauchy itself is not.

    Source: Neville, Ormerod and Wand 2014; Louizos, Ullrich and Welling 2017.

    Args:
        scale: scale of the half-Cauchy √(ab), positive, any shape.
    """

    arg_constraints = {"scale": constraints.positive}
    support = constraints.independent(constraints.positive, 1)
    has_rsample = True

    def __init__(self, scale: Tensor | float, validate_args: bool | None = None) -> None:
        (self.scale,) = broadcast_floating(scale)
        super().__init__(self.scale.shape, torch.Size([2]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> HalfCauchyFactors:
        new = self._get_checked_instance(HalfCauchyFactors, _instance)
        batch_shape = torch.Size(batch_shape)
        new.scale = self.scale.expand(batch_shape)
        super(HalfCauchyFactors, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def log_gammas(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sign, shape parameter and log rate, ``(..., 2)``: (a, 1/b) are gammas, too.

        The logs of these are the logs of (a, b) times the sign.
        """
        zero = torch.zeros_like(self.scale)
        log_rate = torch.stack([-2 * self.scale.log(), zero], dim=-1)
        sign = torch.stack([zero + 1, zero - 1], dim=-1)
        return sign, torch.full_like(log_rate, 0.5), log_rate

    @property
    def gamma(self) -> Gamma:
        """The law of a."""
        half = torch.full_like(self.scale, 0.5)
        return Gamma(half, self.scale.square().reciprocal(), validate_args=False)

    @property
    def inverse_gamma(self) -> InverseGamma:
        """The law of b."""
        half = torch.full_like(self.scale, 0.5)
        return InverseGamma(half, torch.ones_like(half), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(scale²/2, ∞)."""
        return torch.stack([self.gamma.mean, self.inverse_gamma.mean], dim=-1)

    @property
    def variance(self) -> Tensor:
        """(scale⁴/2, ∞)."""
        return torch.stack([self.gamma.variance, self.inverse_gamma.variance], dim=-1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        # Gamma(1/2, 1) is the law of ε²/2 for a standard normal ε.
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device)
        half_squares = (0.5 * noise.square()).clamp(min=torch.finfo(noise.dtype).tiny)
        numerator, denominator = half_squares.unbind(-1)
        return torch.stack([self.scale.square() * numerator, denominator.reciprocal()], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        a, b = value.unbind(-1)
        return self.gamma.log_prob(a) + self.inverse_gamma.log_prob(b)
