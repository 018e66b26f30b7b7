"""How much each unit, or each weight, matters: one function a measure, posterior in, numbers out.

A measure takes a :class:`~pyro_sparse.posterior.Posterior` and returns ``{group: (units,)}``, or
``{group: (units, row length)}`` where it speaks of single weights; larger means: keep. Selection
rules (:mod:`.selection`) turn measures into masks. A measure raises :class:`NotOfferedError` where
the posterior does not have what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .fitted import OFFERS, NotOfferedError
from .network import FittedNetwork
from .reduction import delta_evidence

__all__ = [
    "OFFERS",
    "Importance",
    "NotOfferedError",
    "Offered",
    "Random",
    "Shapley",
    "inclusion_probability",
    "log_scale",
    "magnitude",
    "noise_signal",
    "retention",
    "weight_evidence",
    "weight_signal",
    "weight_signal_plus_robustness",
]

Importance: TypeAlias = Callable[[FittedNetwork], dict[str, Tensor]]


@dataclass(frozen=True)
class Offered:
    """The measure of one of a guide's offers, see :class:`pyro_sparse.guides.Offer`.

    Attributes:
        name: of the offer.
    """

    name: str

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        return posterior.offer(self.name, f"the measure of {self.name!r}").values


def inclusion_probability(posterior: FittedNetwork) -> dict[str, Tensor]:
    """γ = q(unit is in), the guide's own, see `Posterior.guide_inclusion`."""
    return posterior.offer("inclusion", "the inclusion probability").values


def noise_signal(posterior: FittedNetwork) -> dict[str, Tensor]:
    """E θ / sd θ of a multiplicative noise (Neklyudov et al. 2017, eq. 15)."""
    return posterior.offer("noise", "the signal-to-noise ratio of units").values


def retention(posterior: FittedNetwork) -> dict[str, Tensor]:
    """−log α of units: log of squared mean over variance of their scales."""
    return posterior.offer("log_alpha", "the rule on dropout rates").values


def log_scale(posterior: FittedNetwork) -> dict[str, Tensor]:
    """Posterior mean of the log of units' scales."""
    return posterior.offer("log_scales", "the rule on scales").values


def weight_signal(posterior: FittedNetwork) -> dict[str, Tensor]:
    """|μ| / σ of every weight."""
    laws = posterior.offer("gaussians", "the signal-to-noise ratio of weights").laws
    return {name: law.loc.abs() / law.variance.sqrt() for name, law in laws.items()}


def weight_signal_plus_robustness(posterior: FittedNetwork) -> dict[str, Tensor]:
    """|μ| + σ of every weight, the other baseline of Beckers et al. 2022."""
    laws = posterior.offer("gaussians", "signal plus robustness").laws
    return {name: law.loc.abs() + law.variance.sqrt() for name, law in laws.items()}


def weight_evidence(posterior: FittedNetwork) -> dict[str, Tensor]:
    """−ΔF of every weight: the evidence that is lost with it, nats."""
    laws = posterior.offer("gaussians", "the change of evidence of weights").laws
    return {
        name: -delta_evidence(law.loc, law.variance, law.prior_variance)
        for name, law in laws.items()
    }


def magnitude(posterior: FittedNetwork) -> dict[str, Tensor]:
    """Euclidean norm of each unit's row, divided by the layer's root mean square norm.

    Not Bayesian: a baseline. The division makes layers comparable, which initial scales are not.
    """
    parameters = posterior.mean_parameters()
    norms = {}
    for group in posterior.model.graph:
        if group.prunable and group.writers:
            norm = posterior.model.graph.rows(parameters, group.name).norm(dim=1)
            norms[group.name] = (norm / norm.square().mean().sqrt().clamp_min(1e-30)).cpu()
    return norms


@dataclass(frozen=True)
class Random:
    """Uniform random numbers. Not Bayesian: a baseline that every other must beat.

    Attributes:
        seed: of the generator; the caller's random state is untouched.
    """

    seed: int = 0

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {
            group.name: torch.rand(group.size, generator=generator)
            for group in posterior.model.graph
            if group.prunable and group.writers
        }


@dataclass(frozen=True)
class Shapley:
    r"""The Shapley value of every unit: its mean marginal gain in log-likelihood over orders.

    .. math:: φ_j = E_π [ v(S_π^j ∪ \{j\}) − v(S_π^j) ]

    where :math:`S_π^j` are the units of the layer that come before ``j`` in the random order π, the
    units of other layers are all in, and ``v`` is the mean log-likelihood per example of the
    network at posterior means. Estimated by permutation sampling (Castro, Gómez, Tejada 2009), each
    order also walked backwards (antithetic). The values of a layer sum to v(all) − v(none) exactly.
    The idea of ranking units as players of a game is that of Diaz-Ortiz et al. (GTAP, 2023); this
    is an estimator of our own. Not Bayesian: a baseline.

    Attributes:
        x: examples to score on.
            Shape: (N, ...).
        y: their targets.
            Shape: (N,).
        orders: random orders a layer; each costs twice as many forward passes as it has units.
        seed: of the orders.
    """

    x: Tensor
    y: Tensor
    orders: int = 4
    seed: int = 0

    @torch.no_grad()
    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        values = {}
        for group in posterior.model.graph:
            if not (group.prunable and group.writers):
                continue
            total = torch.zeros(group.size, dtype=torch.float64)
            for _ in range(self.orders):
                order = torch.randperm(group.size, generator=generator)
                for walk in (order, order.flip(0)):
                    mask = torch.zeros(group.size, dtype=torch.bool)
                    before = self._value(posterior, {group.name: mask})
                    for unit in walk.tolist():
                        mask[unit] = True
                        after = self._value(posterior, {group.name: mask})
                        total[unit] += after - before
                        before = after
            values[group.name] = total / (2 * self.orders)
        return values

    def _value(self, posterior: FittedNetwork, keep: Mapping[str, Tensor]) -> float:
        output = posterior.masked(self.x, keep)
        latents = posterior.mean_latents()
        law = posterior.model.likelihood.distribution(output, **latents)
        return float(law.log_prob(self.y).double().mean())
