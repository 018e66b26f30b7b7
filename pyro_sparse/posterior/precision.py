r"""How many bits a weight deserves: rounding that stays below the posterior standard deviation.

A posterior that leaves a weight uncertain by σ says that digits far below σ mean nothing. Floating
point with ``t`` mantissa bits (and an implied leading 1) holds a number of exponent
:math:`e = ⌊\log_2 |w|⌋` to within :math:`2^{e−t−1}`, so that weight ``i`` needs

.. math:: t_i = \max(0, ⌈ e_i − 1 − \log_2 σ_i ⌉), \qquad t = \max_i t_i

in its layer. A weight with :math:`|μ_i| ≤ σ_i` may become 0 and needs none. Exponents run over
those of the rounded weights that need them, from :math:`e_\text{min}` to :math:`e_\text{max}`, and
one code stands for 0: :math:`⌈\log_2(e_\text{max} − e_\text{min} + 2)⌉` bits. The offset
:math:`e_\text{min}` is one number a layer. With the sign bit, each kept weight of the layer then
rounds by no more than its own posterior standard deviation.

Source: Louizos, Ullrich, Welling (NeurIPS 2017, arXiv 1705.08665) propose to read the precision off
the posterior variances, through the mean variance of a layer; the bound on each single weight, and
the exponents, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .network import FittedNetwork

__all__ = ["Bits", "round_to", "rounded_parameters", "suggested_bits"]


@dataclass(frozen=True)
class Bits:
    """A floating-point format for the weights of a layer.

    Attributes:
        exponent: bits of the exponent, whose lowest code stands for 0; none where all is 0.
        mantissa: bits after the implied leading 1.
        lowest: the smallest exponent :math:`e_min`.
        highest: the largest exponent :math:`e_max`.
        sign: its bit.
    """

    exponent: int
    mantissa: int
    lowest: int = 0
    highest: int = -1
    sign: int = 1

    @property
    def total(self) -> int:
        """Bits a weight."""
        return self.sign + self.exponent + self.mantissa


def suggested_bits(
    posterior: FittedNetwork, keep: Mapping[str, Tensor] | None = None
) -> dict[str, Bits]:
    """The format that the posterior variance suggests for every layer, see the module.

    Variances are marginal over units' scales; a scale on the inputs counts with its mean.

    Args:
        posterior: of a model whose guide has Gaussian weights.
        keep: masks by group; the default rule's when absent. A layer's weights are those that the
            compact network has: rows of kept units, columns that read kept units.

    Raises:
        NotOfferedError: the posterior has no Gaussian weights.
    """
    return {
        name: _format(mean[inside], variance[inside].sqrt())
        for name, (mean, variance, inside) in _weights(posterior, keep).items()
    }


def round_to(weights: Tensor, bits: Bits) -> Tensor:
    """The nearest numbers that a format has; its largest one for what is beyond.

    Args:
        weights: any shape and floating type.
        bits: by `suggested_bits`.
    """
    if not bits.exponent:
        return torch.zeros_like(weights)
    values = weights.double()
    # Below the smallest number lies 0: steps are there as large as that number itself.
    step = torch.ldexp(torch.ones_like(values), (_exponent(values) - bits.mantissa).int())
    smallest = math.ldexp(1.0, bits.lowest)
    largest = math.ldexp(2.0 - math.ldexp(1.0, -bits.mantissa), bits.highest)
    step = torch.where(values.abs() < smallest, torch.full_like(step, smallest), step)
    return ((values / step).round() * step).clamp(-largest, largest).to(weights.dtype)


def rounded_parameters(
    posterior: FittedNetwork, keep: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The masked network's parameters with every layer in its suggested format.

    What the precision costs is the difference that these make, see `suggested_bits` for arguments
    and errors.
    """
    keep = posterior.keep() if keep is None else keep
    formats = suggested_bits(posterior, keep)
    graph = posterior.model.graph
    masked = posterior.masked_parameters(keep)
    rows = {name: round_to(graph.rows(masked, name), bits) for name, bits in formats.items()}
    return {**masked, **graph.parameters(rows)}


@torch.no_grad()
def _weights(
    posterior: FittedNetwork, keep: Mapping[str, Tensor] | None
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By layer mean, variance (float64) and whether the compact network has it."""
    variances = posterior.offer("row_variances", "the suggested precision").laws
    keep = posterior.keep() if keep is None else keep
    graph = posterior.model.graph
    means = posterior.mean_parameters()
    spread = graph.parameters({name: value.double() for name, value in variances.items()})
    scale = posterior.guide.mean_input()
    if scale is not None:
        spread = graph.scale_columns(spread, "input", scale.double().square())
    inside = {name: torch.ones_like(means[name], dtype=torch.double) for name in spread}
    inside = graph.masked_parameters(inside, keep)
    for group in graph:
        if group.name in keep:
            inside = graph.scale_columns(inside, group.name, keep[group.name].double())
    return {
        name: (
            graph.rows(means, name).double(),
            graph.rows(spread, name),
            graph.rows(inside, name) != 0,
        )
        for name in variances
    }


def _format(mean: Tensor, deviation: Tensor) -> Bits:
    needed = mean.abs() > deviation
    if not bool(needed.any()):
        return Bits(exponent=0, mantissa=0)
    mean, deviation = mean[needed], deviation[needed]
    mantissa = int((_exponent(mean) - 1 - deviation.log2()).ceil().clamp_min(0).max())
    # Rounding up may reach the next power of 2.
    step = torch.ldexp(torch.ones_like(mean), (_exponent(mean) - mantissa).int())
    exponents = _exponent((mean / step).round() * step)
    lowest, highest = int(exponents.min()), int(exponents.max())
    return Bits(math.ceil(math.log2(highest - lowest + 2)), mantissa, lowest, highest)


def _exponent(values: Tensor) -> Tensor:
    """⌊log2 |x|⌋, exactly; that of 0 is far below any other."""
    exponent = torch.frexp(values).exponent - 1
    return torch.where(values == 0, torch.full_like(exponent, -1000), exponent).double()
