"""A normal distribution of all entries of a matrix together."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["JointNormal"]


class JointNormal(TorchDistribution):
    r"""A matrix whose entries, one row after another, are jointly normal.

    .. math:: \operatorname{vec}(w) \sim N(\operatorname{vec}(\mu), L L^\top)

    Args:
        loc: means μ, shape (K, m); the event shape.
        scale_tril: lower triangular L with a positive diagonal, shape (K·m, K·m).

    Raises:
        ValueError: the shapes do not fit.
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.lower_cholesky,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        if loc.dim() != 2 or scale_tril.shape != (loc.numel(), loc.numel()):
            raise ValueError(
                "JointNormal needs loc (K, m) and scale_tril (K·m, K·m), got loc "
                f"{tuple(loc.shape)}, scale_tril {tuple(scale_tril.shape)}"
            )
        dtype = torch.promote_types(loc.dtype, scale_tril.dtype)
        if not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
        self.loc, self.scale_tril = loc.to(dtype), scale_tril.to(dtype)
        super().__init__(torch.Size(), loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> JointNormal:
        if torch.Size(batch_shape) != self.batch_shape:
            raise NotImplementedError(
                f"a JointNormal has no batch shape, got {tuple(batch_shape)}; in plates use "
                "MultivariateNormal"
            )
        return self

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1).reshape(self.loc.shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = (*sample_shape, self.loc.numel())
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + (noise @ self.scale_tril.T).reshape(*sample_shape, *self.loc.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        error = (value - self.loc).flatten(-2).unsqueeze(-1)
        whitened = torch.linalg.solve_triangular(self.scale_tril, error, upper=False).squeeze(-1)
        return -0.5 * whitened.square().sum(-1) - self._log_normaliser()

    def entropy(self) -> Tensor:
        return self._log_normaliser() + 0.5 * self.loc.numel()

    def _log_normaliser(self) -> Tensor:
        log_diagonal = self.scale_tril.diagonal().log().sum()
        return log_diagonal + 0.5 * self.loc.numel() * math.log(2 * math.pi)
