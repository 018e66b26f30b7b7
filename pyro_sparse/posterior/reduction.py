r"""Bayesian model reduction: the evidence of a smaller model from the posterior of a larger one.

With the posterior q under the prior p, another prior p̃ has the log evidence

.. math:: ΔF = \log E_q[\tilde p(θ) / p(θ)], \qquad \tilde q ∝ q \tilde p / p

relative to p's: positive where the reduced model explains the data better. Nothing is refitted, and
where q is the exact posterior the formula is exact. What ΔF ≥ 0 prunes, the data do not support.

Source: Friston and Penny (NeuroImage 56, 2011); for networks Beckers et al. (arXiv 2210.09134).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sparse.distributions import TruncatedLogNormal

__all__ = ["delta_evidence", "delta_evidence_joint", "delta_evidence_noise"]


def delta_evidence(
    loc: Tensor,
    variance: Tensor,
    prior_variance: Tensor | float,
    reduced_variance: Tensor | float = 0.0,
) -> Tensor:
    r"""ΔF of narrowing the prior of each number from N(0, s₀²) to N(0, s_r²), in nats.

    With :math:`P_f = 1/v`, :math:`P = P_f + 1/s_r² − 1/s_0²` and :math:`m = P_f μ / P`,

    .. math::
        ΔF = −\tfrac12 (μ² P_f − m² P) + \tfrac12 \log\frac{P_f s_0²}{P s_r²},

    written so that :math:`s_r → 0`, the point mass, is its limit
    :math:`\tfrac12 [\log(s_0²/v) − μ²/v]`. Under a mean-field q the ΔF of a group is the sum.

    Args:
        loc: posterior means μ, any shape.
        variance: posterior variances v.
        prior_variance: :math:`s_0²`.
        reduced_variance: :math:`s_r²`, at most about :math:`s_0²`; 0 is the point mass at 0.

    Raises:
        ValueError: where the reduced posterior is not a distribution (P ≤ 0).
    """
    s0 = torch.as_tensor(prior_variance, dtype=loc.dtype, device=loc.device)
    sr = torch.as_tensor(reduced_variance, dtype=loc.dtype, device=loc.device)
    # P v s_r² / v = s_r² P: 1 at the point mass, where P itself is infinite.
    scaled = 1 + sr / variance - sr / s0
    if not bool((scaled > 0).all()):
        raise ValueError(
            "expected a reduced variance that leaves a proper posterior (1/v + 1/s_r² > 1/s_0²), "
            f"got up to {float(sr.max()):g} for a prior variance of {float(s0.max()):g}"
        )
    # μ² P_f − m² P = μ²/v (1 − P_f/P), and 1 − P_f/P = (1/s_r² − 1/s_0²)/P without a difference of
    # numbers near 1
    shrinkage = (1 - sr / s0) / scaled
    return 0.5 * (
        torch.log(s0 / variance) - torch.log(scaled) - loc.square() / variance * shrinkage
    )


def delta_evidence_joint(loc: Tensor, covariance: Tensor, prior_variance: Tensor | float) -> Tensor:
    r"""ΔF of fixing a whole group at 0, for a joint Gaussian posterior, in nats.

    .. math::
        ΔF = \log \frac{N(0; μ, Σ)}{N(0; 0, s_0² I)}
           = \tfrac12 \left[ m \log s_0² − \log\det Σ − μ^⊤ Σ^{-1} μ \right],

    the Savage–Dickey ratio; for a diagonal Σ the sum of the single ones.

    Args:
        loc: means μ of the group's m numbers. Shape: (..., m).
        covariance: Σ, their block of the posterior covariance. Shape: (..., m, m).
        prior_variance: :math:`s_0²`, one number.
    """
    factor = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(factor, loc.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    s0 = torch.as_tensor(prior_variance, dtype=loc.dtype, device=loc.device)
    return 0.5 * (loc.shape[-1] * s0.log() - log_det - whitened.square().sum(-1))


def delta_evidence_noise(
    law: TruncatedLogNormal, window: tuple[float, float] | None = None
) -> Tensor:
    r"""ΔF of a prior on a multiplicative noise that is concentrated where the unit is off (BMRS).

    The prior is log θ ∼ U[a, b], the posterior log θ ∼ q = TruncatedNormal(μ, σ²; [a, b]).
    Without a window the reduced prior is a point at the lower end (BMRS_N in its limit), and

    .. math:: ΔF = \log[(b − a)\, q(a)] = \log\frac{(b−a)\, φ((a−μ)/σ)}{σ Z},

    the Savage–Dickey ratio. With a window [a', b'] it is uniform there (BMRS_U):

    .. math:: ΔF = \log\frac{b − a}{b' − a'} + \log q(a' ≤ \log θ ≤ b').

    A unit whose posterior is its prior has ΔF = 0 for every reduced prior: the data say nothing
    about it, and prior odds must decide (see :class:`~pyro_sparse.posterior.selection.BMRS`).

    Args:
        law: posterior of θ, batch shape ``(units,)``.
        window: :math:`(a', b')` in log space.

    Raises:
        ValueError: for a window that is empty or reaches beyond [a, b].

    Source: Wright, Igel, Selvan (NeurIPS 2024, arXiv 2406.01345), with the factor 2π that the
    authors' code drops.
    """
    q = law.log_distribution
    width = (q.high - q.low).log()
    if window is None:
        return width + q.log_prob(q.low)
    low, high = window
    if not (low < high and bool((q.low <= low).all()) and bool((high <= q.high).all())):
        raise ValueError(
            f"expected a window within the prior's interval, got {window} in "
            f"[{float(q.low.max()):g}, {float(q.high.min()):g}]"
        )
    return width - math.log(high - low) + q.log_mass(low, high)
