"""How noisy the gradient is that a guide is trained with."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_sparse.guides import GroupGuide
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters

from .elbo import ELBO
from .moments import Moments

__all__ = ["GradientVariance", "gradient_variance"]


@dataclass(frozen=True)
class GradientVariance:
    r"""Moments of a stochastic gradient g over draws on one batch; see `gradient_variance`.

    Attributes:
        by_parameter: :math:`Σ_i \text{Var } g_i` by the guide's parameters.
        squared_norm: :math:`‖E g‖²`, unbiased: the variance of the mean is taken off; at least 0.
    """

    by_parameter: dict[str, float]
    squared_norm: float

    @property
    def total(self) -> float:
        r"""Trace of the gradient's covariance, :math:`Σ_i \text{Var } g_i`."""
        return sum(self.by_parameter.values())

    @property
    def relative(self) -> float:
        r"""Noise over signal, :math:`Σ_i \text{Var } g_i / ‖E g‖²`; infinite where g is all noise.

        Unlike `total` it does not depend on the loss's unit. Near an optimum the signal vanishes.
        """
        if not self.total:
            return 0.0
        return self.total / self.squared_norm if self.squared_norm else float("inf")


def gradient_variance(
    model: SparseModel,
    guide: GroupGuide,
    x: Tensor,
    y: Tensor,
    *,
    draws: int = 30,
    num_particles: int = 1,
    local_reparameterisation: bool = True,
    seed: int = 0,
) -> GradientVariance:
    r"""Variance of the gradient of the loss per example, over draws of the guide on one batch.

    With :math:`g_r` the gradient of :math:`-\text{ELBO} / N` in all parameters of the guide in the
    r-th of R repetitions,

    .. math:: \text{Var } g_i = \frac{1}{R-1} Σ_r (g_{r,i} − \bar g_i)², \qquad
              ‖E g‖² ≈ ‖\bar g‖² − \frac1R Σ_i \text{Var } g_i.

    The batch is fixed, so this is the noise of the draws and of the estimator of the inclusions,
    not that of subsampling. Model and guide are left as they are.

    Args:
        model: see :mod:`pyro_sparse.models`.
        guide: its guide, at the point where the variance is asked for.
        x: inputs of the batch.
            Shape: (batch, ...).
        y: their targets.
            Shape: (batch,).
        draws: repetitions R.
        num_particles, local_reparameterisation: of the estimator, see `fit`.
        seed: of the draws; the caller's random state is left as it was.

    Raises:
        ValueError: fewer than two draws.
    """
    if draws < 2:
        raise ValueError(f"expected at least two draws, got {draws}")
    # A copy: training mode updates the statistics of normalisations.
    model, guide = copy.deepcopy((model, guide))
    elbo = ELBO(num_particles, local_reparameterisation=local_reparameterisation)
    parameters = dict(guide.named_parameters())
    moments = Moments()
    with (
        torch.random.fork_rng([]),
        own_parameters(model, guide),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(seed)
        for _ in range(draws):
            loss = elbo.estimate(model, guide, x, y).loss / model.num_data
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            moments.add(
                {
                    name: torch.zeros_like(parameter) if gradient is None else gradient
                    for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
                }
            )
    variances = {name: float(moments.variance(name).sum()) for name in parameters}
    norm = sum(float(value.square().sum()) for value in moments.mean.values())
    return GradientVariance(variances, max(0.0, norm - sum(variances.values()) / draws))
