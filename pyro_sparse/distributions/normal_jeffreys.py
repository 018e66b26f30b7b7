"""Jeffreys' prior of a scale, which is improper."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["NormalJeffreys"]

EULER = 0.5772156649015329
CONSTANT = 0.5 * (math.log(2) + EULER) + 0.5 * (math.log(2 * math.pi) + 1)


class NormalJeffreys(TorchDistribution):
    r"""The improper law :math:`p(z) ∝ 1 / |z|` on the real line.

    With :math:`w \mid z ∼ N(0, z²)` it is the normal-Jeffreys prior of w, :math:`p(w) ∝ 1/|w|`. It
    does not change when z is multiplied by a number, so a KL from it depends on a normal's
    :math:`α = σ²/μ²` alone,

    .. math::
        \mathrm{KL}(N(μ, σ²) ‖ p) = E_{ε ∼ N(1, α)} \log|ε| − \tfrac12 \log α
            + \tfrac12 (\log 2 + \mathtt{γ}) ,

    with Euler's constant γ, where the additive constant that an improper law leaves open makes it 0
    at α = ∞. What is registered with ``torch.distributions.kl_divergence`` is the approximation

    .. math::
        k_1 + \tfrac12 \log(1 + α^{-1}) − k_1\, \mathrm{sigmoid}(k_2 + k_3 \log α), \qquad
        k = (0.63576, 1.87320, 1.48695),

    which is within 0.0095 nats of it for :math:`\log α ∈ [−10, 10]` (most at −3.5, where the KL
    is 2.369 and the approximation 2.379).

    There are no samples. ``log_prob`` is :math:`−\log|z|` less the constant that belongs to this
    KL, :math:`\tfrac12 (\log 2 + \mathtt{γ}) + \tfrac12 \log 2πe`, so that estimates by draws agree
    with it.

    Source: the KL's approximation is that of Molchanov, Ashukha, Vetrov, *Variational dropout
    sparsifies deep neural networks* (ICML 2017, eq. 14), which Louizos, Ullrich, Welling (NeurIPS
    2017) use for groups.

    Args:
        batch_shape: of independent z.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real

    def __init__(self, batch_shape: Any = (), validate_args: bool | None = None) -> None:
        super().__init__(torch.Size(batch_shape), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalJeffreys:
        new = self._get_checked_instance(NormalJeffreys, _instance)
        super(NormalJeffreys, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        raise NotImplementedError("NormalJeffreys is improper: it cannot be sampled")

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return -value.abs().log() - CONSTANT
