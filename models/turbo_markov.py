"""Turbo-VBI: a three-layer hierarchical prior whose support is a Markov chain along the units."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_sparse.distributions import MarkovChain
from pyro_sparse.graph import Group
from pyro_sparse.ranges import positive, whole

from .base import SparseModel

__all__ = ["TurboMarkov"]


def select(s: Tensor, on: dist.Gamma, off: dist.Gamma) -> dist.Gamma:
    """``on`` where s = 1, ``off`` where s = 0."""
    return dist.Gamma(
        torch.where(s > 0.5, on.concentration, off.concentration),
        torch.where(s > 0.5, on.rate, off.rate),
    )


class TurboMarkov(SparseModel):
    r"""Support, precision, weights: the three layers of Turbo-VBI's prior.

    For the units :math:`j` of a layer, with rows of ``m`` weights:

    .. math::
        s &∼ \text{MarkovChain}(λ, κ) \\
        ρ_j \mid s_j = 1 &∼ \text{Gamma}(a, b), \qquad
        ρ_j \mid s_j = 0 ∼ \text{Gamma}(\bar a, \bar b) \\
        w_j \mid ρ_j &∼ N(0, ρ_j^{-1} I).

    The chain is stationary: every unit is in with probability λ, and neighbours' supports have
    correlation κ, so that survivors come in runs. The rates are set through the norm of a row,
    which is about :math:`\sqrt{m / ρ}`: :math:`b = a\, r² / m` with ``r = norm``, and
    :math:`\bar b = \bar a\, \bar r² / m` with :math:`\bar r` = ``off_norm``. Nothing is exactly 0:
    a unit that is out has weights of about :math:`\bar r / \sqrt m`.

    With ``block_size`` every row is cut into blocks of that many consecutive weights (the last one
    may be shorter; the bias is a row's last weight). Each has a support and a precision of its own,
    and a chain runs along the blocks of each row. Chains along both axes would be an Ising grid,
    on which sum-product is not exact.

    Sites: ``{group}.support`` (s), ``{group}.precision`` (ρ), ``{group}.rows`` (w); s and ρ have
    shape ``(units,)``, or ``(units, blocks)``.

    Args:
        density: λ, the prior probability of being in, in (0, 1).
        persistence: κ in [0, 1); 0 makes units independent.
        shape: strength of the prior of ρ of a unit that is in, counted in rows:
            :math:`a` is ``shape`` times m/2. Large: the unit's weights are Gaussian of one scale.
            Above ``off_shape``, rows far larger than ``norm`` (11 and more by default) count as out
            again.
        norm: ``r``, root-mean-square norm of a row at the mean precision of a unit that is in.
        off_shape: the same as ``shape`` of a unit that is out, for :math:`\bar a`. Small: heavy
            tails, so that a unit counts as out far above ``off_norm``, and is drawn down to it.
        off_norm: :math:`\bar r`, the norm of a unit that is out; below ``norm``.
        block_size: weights a block, or None for whole rows.

    Raises:
        ValueError: for a number out of range, and for ``prune_inputs``: the hierarchy lives on
            weights, a gate on inputs has none.

    Further parameters: see :class:`~pyro_sparse.models.base.SparseModel`.
    Source: Xia, Tsang, Lau, IEEE TSP 71 (2023), arXiv 2302.10483; docs/turbo_vbi.md says what of
    it is ours.
    """

    not_taken: tuple[str, ...] = ("prune_inputs", "input_inclusion_probability")

    def __init__(
        self,
        net: nn.Module,
        example: Tensor,
        *,
        density: float = 0.1,
        persistence: float = 0.5,
        shape: float = 20.0,
        norm: float = 5.0,
        off_shape: float = 0.2,
        off_norm: float = 0.03,
        block_size: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(net, example, **shared)
        positive(shape=shape, norm=norm, off_shape=off_shape, off_norm=off_norm)
        if not 0 < density < 1:
            raise ValueError(f"expected density strictly between 0 and 1, got {density}")
        if not 0 <= persistence < 1:
            raise ValueError(f"expected persistence in [0, 1), got {persistence}")
        if not off_norm < norm:
            raise ValueError(f"expected off_norm below norm, got {off_norm} and {norm}")
        if block_size is not None:
            whole(block_size=block_size)
        if self.prune_inputs:
            raise ValueError(
                "TurboMarkov cannot prune inputs: its supports stand above weights, of which a "
                "gate on an input has none; pass prune_inputs=False"
            )
        self.block_size = block_size
        for name, value in {
            "density": density,
            "persistence": persistence,
            "shape": shape,
            "norm": norm,
            "off_shape": off_shape,
            "off_norm": off_norm,
        }.items():
            self.register_constant(name, value)

    def blocks(self, group: Group) -> int:
        """How many blocks a row has; 1 for whole rows."""
        length = self.row_shape(group)[1]
        return 1 if self.block_size is None else math.ceil(length / self.block_size)

    def chain(self, group: Group) -> MarkovChain:
        """The prior of s: one chain of units, or with blocks a chain for each unit.

        Pruned units are known to be out: the chain of units is conditioned on that.
        """
        if self.block_size is not None:
            chain = MarkovChain.stationary(self.density, self.persistence, self.blocks(group))
            return chain.expand([group.size])
        chain = MarkovChain.stationary(self.density, self.persistence, group.size)
        if not self.support.restricted:
            return chain
        out = torch.zeros_like(self.density).masked_fill(~self.support[group.name], -math.inf)
        return chain.condition(out)

    def gammas(self, group: Group) -> tuple[dist.Gamma, dist.Gamma]:
        """The priors of ρ given s = 1 and given s = 0."""
        length = self.row_shape(group)[1]
        sizes = self.sizes(group)
        shape, off_shape = self.shape * sizes / 2, self.off_shape * sizes / 2
        rate = shape * self.norm.square() / length
        off_rate = off_shape * self.off_norm.square() / length
        return dist.Gamma(shape, rate), dist.Gamma(off_shape, off_rate)

    def sizes(self, group: Group) -> Tensor:
        """How many weights share each precision, as numbers of the shape of s."""
        units, length = self.row_shape(group)
        ones = torch.ones_like(self.density).expand(units, length)
        return self.block_sums(ones)

    def block_sums(self, weights: Tensor) -> Tensor:
        """Sums of ``(units, row length)`` over rows, or over blocks: of the shape of s."""
        if self.block_size is None:
            return weights.sum(-1)
        padded = nn.functional.pad(weights, (0, -weights.shape[-1] % self.block_size))
        return padded.unflatten(-1, (-1, self.block_size)).sum(-1)

    def spread(self, group: Group, values: Tensor) -> Tensor:
        """``(units, row length)``: a block's number for each of its weights."""
        units, length = self.row_shape(group)
        if self.block_size is None:
            return values.unsqueeze(-1).expand(units, length)
        return values.repeat_interleave(self.block_size, -1)[..., :length]

    def hierarchical_rows(self, group: Group) -> Tensor:
        """``{group}.support``, ``{group}.precision`` and ``{group}.rows``."""
        chain = self.chain(group)
        if chain.batch_shape:
            chain = self.support.law(group.name, chain).to_event(1)
        s = pyro.sample(f"{group.name}.support", chain)

        gamma = select(s, *self.gammas(group))
        by_unit = self.support.law(group.name, gamma.to_event(s.dim() - 1))
        rho = pyro.sample(f"{group.name}.precision", by_unit.to_event(1))

        scale = self.spread(group, rho.rsqrt())
        normal = dist.Normal(torch.zeros_like(self.density), scale).to_event(1)
        return pyro.sample(f"{group.name}.rows", self.support.law(group.name, normal).to_event(1))

    def rows(self) -> dict[str, Tensor]:
        return {
            group.name: self.hierarchical_rows(group)
            if group.prunable
            else self.gaussian_rows(group)
            for group in self.layers
        }
