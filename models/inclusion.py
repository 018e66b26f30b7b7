"""The prior inclusion probability of a unit, layer by layer, as the contraction theory sets it."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["complexities", "layerwise_inclusion_logits", "logit"]


def logit(log_probability: float) -> float:
    """``log p − log(1−p)`` from ``log p``, exact for ``p`` near 0 and near 1."""
    return log_probability - math.log(-math.expm1(log_probability))


def layerwise_inclusion_logits(
    fan_ins: Sequence[int],
    widths: Sequence[int],
    num_data: int,
    constant: float = 1e-9,
    floor: float = 0.0,
) -> list[float]:
    r"""Logits of the layer-wise prior inclusion probabilities :math:`λ_l` of Jantre et al.

    With ``L+1`` layers of fan-in :math:`k_l` and :math:`K_l` units, ``n`` training examples,

    .. math::
        u_l &= (L+1)^2 [\log n + \log(L+1) + \log(k_l+1) + \log K_l] \\
        ϑ_l &= (k_l+1)^2 + Σ_{m≠l} \log(k_m+1) + L + \log K_l + \log(k_l+1) + \log n
               + \log Σ_m u_m \\
        λ_l &= K_l^{-1} \exp(−C (k_l+1) ϑ_l).

    Args:
        fan_ins: :math:`k_l` of every layer, the output layer last.
        widths: :math:`K_l` of every layer, the output layer last.
        num_data: number of training examples ``n``.
        constant: :math:`C` (1e-9 in the authors' runs; 0 gives :math:`λ_l = 1/K_l`).
        floor: the least :math:`λ_l`, or :math:`1/K_l` where that is less. C was set for 784 inputs;
            the exponent grows with :math:`(k_l + 1)^3`, is 1 nat at 1000 inputs, 8 at 2000 and 1000
            at 10 000, where no data could include a unit.

    Raises:
        ValueError: where the constant is negative or infinite, or the floor is no probability.

    Returns:
        ``logit λ_l`` of every layer (a layer that is never pruned, the output, ignores its).

    Source: Jantre, Bhattacharya, Maiti, *Layer adaptive node selection in Bayesian neural networks*
    (Neural Networks 167, 2023; arXiv 2108.11000), the rule of their code.
    """
    if not isinstance(constant, int | float) or not 0 <= constant < math.inf:
        raise ValueError(f"expected a non-negative, finite inclusion constant, got {constant}")
    if not 0 <= floor < 1:
        raise ValueError(f"expected an inclusion floor in [0, 1), got {floor}")
    # The first term of ϑ_l is the bound on the rows' norm that the rule assumes.
    thetas, _ = complexities(fan_ins, widths, num_data, [(k + 1) ** 2 for k in fan_ins])
    logits = []
    for k, width, theta in zip(fan_ins, widths, thetas, strict=True):
        log_inclusion = -math.log(width) - constant * (k + 1) * theta
        if floor:
            log_inclusion = max(log_inclusion, min(math.log(floor), -math.log(width)))
        # A layer of one unit with C = 0 has λ = 1: keep it a proper Bernoulli.
        logits.append(logit(min(log_inclusion, -1e-6)))
    return logits


def complexities(
    fan_ins: Sequence[int], widths: Sequence[int], num_data: int, first: Sequence[float]
) -> tuple[list[float], list[float]]:
    """:math:`ϑ_l` and :math:`u_l` of `layerwise_inclusion_logits` for every layer.

    Args:
        fan_ins: :math:`k_l`, the output layer last.
        widths: :math:`K_l`.
        num_data: ``n``.
        first: the first term of every :math:`ϑ_l`: :math:`B_l²/(k_l+1)`, with :math:`B_l` the
            bound on the norm of a unit's row, in the theorem; :math:`(k_l+1)²` in the rule above.
    """
    depth = len(widths)
    u = [
        depth**2 * (math.log(num_data) + math.log(depth) + math.log(k + 1) + math.log(width))
        for k, width in zip(fan_ins, widths, strict=True)
    ]
    theta = []
    for layer, (k, width) in enumerate(zip(fan_ins, widths, strict=True)):
        others = sum(math.log(m + 1) for i, m in enumerate(fan_ins) if i != layer)
        theta.append(
            first[layer]
            + others
            + (depth - 1)
            + math.log(width)
            + math.log(k + 1)
            + math.log(num_data)
            + math.log(sum(u))
        )
    return theta, u
