"""The prior inclusion probability of a unit, layer by layer, as the contraction theory sets it."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["layerwise_inclusion_logits", "logit"]


def logit(log_probability: float) -> float:
    """``log p − log(1−p)`` from ``log p``, exact for ``p`` near 0 and near 1."""
    return log_probability - math.log(-math.expm1(log_probability))


def layerwise_inclusion_logits(
    fan_ins: Sequence[int], widths: Sequence[int], num_data: int, constant: float = 1e-9
) -> list[float]:
    r"""Logits of the layer-wise prior inclusion probabilities :math:`λ_l` of Jantre et al.

    With ``L+1`` layers of fan-in :math:`k_l` and :math:`K_l` units, ``n`` training examples,

    .. math::
        u_l &= (L+1)^2 [\log n + \log(L+1) + \log(k_l+1) + \log K_l] \\
        ϑ_l &= (k_l+1)^2 + Σ_{m≠l} \log(k_m+1) + L + \log K_l + \log(k_l+1) + \log n
               + \log Σ_m u_m \\
        λ_l &= K_l^{-1} \exp(−C (k_l+1) ϑ_l).

    :param fan_ins: :math:`k_l` of every layer, the output layer last.
    :param widths: :math:`K_l` of every layer, the output layer last.
    :param num_data: number of training examples ``n``.
    :param constant: :math:`C` (1e-9 in the authors' runs; 0 gives :math:`λ_l = 1/K_l`).
    :raises ValueError: where the constant is negative or infinite.
    :returns: ``logit λ_l`` of every layer (a layer that is never pruned, the output, ignores its).

    Source: Jantre, Bhattacharya, Maiti, *Layer adaptive node selection in Bayesian neural networks*
    (Neural Networks 167, 2023; arXiv 2108.11000), the rule of their code.
    """
    if not 0 <= constant < math.inf:
        raise ValueError(f"expected a non-negative, finite inclusion constant, got {constant}")
    depth = len(widths)
    u = [
        depth**2 * (math.log(num_data) + math.log(depth) + math.log(k + 1) + math.log(width))
        for k, width in zip(fan_ins, widths, strict=True)
    ]
    logits = []
    for layer in range(depth):
        k, width = fan_ins[layer], widths[layer]
        others = sum(math.log(m + 1) for i, m in enumerate(fan_ins) if i != layer)
        theta = (
            (k + 1) ** 2
            + others
            + (depth - 1)
            + math.log(width)
            + math.log(k + 1)
            + math.log(num_data)
            + math.log(sum(u))
        )
        log_inclusion = -math.log(width) - constant * (k + 1) * theta
        # A layer of one unit with C = 0 has λ = 1: keep it a proper Bernoulli.
        logits.append(logit(min(log_inclusion, -1e-6)))
    return logits
