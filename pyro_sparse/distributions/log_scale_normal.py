"""A normal distribution that is given by the log of its scale."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_sparse.distributions.analytic import broadcast_floating, normal_draw

__all__ = ["LogScaleNormal"]


class LogScaleNormal(Normal):
    r"""N(μ, σ²), parameterised by log σ, as guides keep it.

    The same law as :class:`pyro.distributions.Normal`; its draws and its KL have the gradient in
    log σ itself, without the passes over the weights that a scale in between costs.

    Args:
        loc: μ.
        log_scale: log σ, of the same shape.

    Raises:
        ValueError: the shapes differ.
    """

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}

    def __init__(self, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None) -> None:
        if loc.shape != log_scale.shape:
            raise ValueError(
                "LogScaleNormal needs loc and log_scale of one shape, got "
                f"{tuple(loc.shape)} and {tuple(log_scale.shape)}"
            )
        if not (loc.is_floating_point() and log_scale.is_floating_point()):
            loc, log_scale = broadcast_floating(loc, log_scale)
        self.loc, self.log_scale = loc, log_scale
        Distribution.__init__(self, loc.shape, validate_args=validate_args)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """σ; made anew each time, as it takes as much memory as the weights."""
        return self.log_scale.exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogScaleNormal:
        new: LogScaleNormal = self._get_checked_instance(LogScaleNormal, _instance)
        new.loc = self.loc.expand(batch_shape)
        new.log_scale = self.log_scale.expand(batch_shape)
        Distribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(
        self,
        sample_shape: Any = torch.Size(),
        gate: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """A draw, each row of it multiplied by ``gate`` where given; of ``noise`` where given."""
        loc = self.loc.expand(self._extended_shape(sample_shape))
        noise = torch.randn_like(loc) if noise is None else noise
        return normal_draw(loc, noise, gate, self.log_scale)
