"""How far the gradient estimators of the inclusions end from exact inclusion probabilities.

A sparse linear regression with one coefficient a group and known noise has its exact posterior by
enumeration of all supports. The same guide is fitted to it with the score-function estimator and
with both relaxations over temperatures; a fit by the exact gradient of the guide's ELBO shows
what the guide's family can reach at all. Takes about a minute and a half on one core::

    python -m benchmarks.relaxation_bias

docs/inclusion_estimators.md has the table and what follows from it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab
from pyro_sparse.infer import ELBO

TEMPERATURES = (0.1, 0.3, 0.5, 0.67, 1.0)
INCLUSION, NOISE = 0.3, 0.5  # prior inclusion probability; standard deviation of the noise


@dataclass
class Regression:
    """y ~ N(Xβ, NOISE²), β_j ~ SpikeAndSlab(INCLUSION, N(0, 1)); design (n, p), y (n,).

    As a Pyro model it holds ``copies`` independent copies, which are fitted at once.
    """

    design: Tensor
    y: Tensor
    copies: int = 1

    def prior(self) -> SpikeAndSlab:
        zeros = torch.zeros(self.copies, self.design.shape[1], 1, dtype=torch.float64)
        slab = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
        return SpikeAndSlab(probs=torch.full_like(zeros[..., 0], INCLUSION), slab=slab)

    def __call__(self) -> None:
        beta = pyro.sample("beta", self.prior().to_event(2))
        mean = beta.squeeze(-1) @ self.design.mT
        pyro.sample("y", dist.Normal(mean, NOISE).to_event(2), obs=self.y.expand_as(mean))

    def inclusion(self) -> Tensor:
        """Exact inclusion probabilities, by enumeration of all supports."""
        size, groups = self.design.shape
        supports = torch.tensor(
            list(itertools.product([0.0, 1.0], repeat=groups)), dtype=torch.float64
        )
        masked = self.design * supports.unsqueeze(1)
        covariance = masked @ masked.mT + NOISE**2 * torch.eye(size, dtype=torch.float64)
        evidence = dist.MultivariateNormal(torch.zeros_like(self.y), covariance).log_prob(self.y)
        log_odds = math.log(INCLUSION) - math.log1p(-INCLUSION)
        return (evidence + log_odds * supports.sum(1)).softmax(0) @ supports


class Guide(nn.Module):
    """Bernoulli × normal for each coefficient, started at the ridge estimate with PIPs of ½.

    temperature: (copies, 1), or None for the law itself with its score-function gradient.
    """

    def __init__(
        self, problem: Regression, temperature: Tensor | None = None, straight_through: bool = True
    ) -> None:
        super().__init__()
        gram = problem.design.mT @ problem.design / NOISE**2
        precision = gram + torch.eye(len(gram), dtype=torch.float64)
        ridge = torch.linalg.solve(precision, problem.design.mT @ problem.y / NOISE**2)
        self.loc = nn.Parameter(ridge.unsqueeze(1).repeat(problem.copies, 1, 1))
        log_scale = -0.5 * precision.diagonal().log().unsqueeze(1)
        self.log_scale = nn.Parameter(log_scale.repeat(problem.copies, 1, 1))
        self.logits = nn.Parameter(torch.zeros_like(self.loc[..., 0]))
        self.temperature, self.straight_through = temperature, straight_through

    def law(self) -> SpikeAndSlab:
        slab = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        if self.temperature is None:
            return SpikeAndSlab(logits=self.logits, slab=slab)
        return RelaxedSpikeAndSlab(
            self.temperature,
            logits=self.logits,
            slab=slab,
            straight_through=self.straight_through,
        )

    def forward(self) -> None:
        pyro.sample("beta", self.law().to_event(2))


def exact_loss(problem: Regression, guide: Guide) -> Tensor:
    """-ELBO in closed form, but for a constant."""
    q = guide.law()
    mean, variance = q.mean.squeeze(-1), q.variance.squeeze(-1)
    misfit = (problem.y - mean @ problem.design.mT).square().sum()
    misfit = misfit + (variance @ problem.design.square().mT).sum()
    return misfit / (2 * NOISE**2) + kl_divergence(q, problem.prior()).sum()


def fit(guide: Guide, loss: Callable[[], Tensor], steps: int) -> Tensor:
    """Minimise ``loss``; returns the inclusion probabilities of the guide, (copies, p)."""
    optimizer = torch.optim.Adam(
        [
            {"params": [guide.logits], "lr": 0.15},
            {"params": [guide.loc, guide.log_scale], "lr": 0.02},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return guide.logits.detach().sigmoid()


def problems(groups: int = 8, size: int = 40) -> dict[str, Regression]:
    """The same effects, none to strong, in an orthogonal and in a correlated design."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    effects = torch.linspace(0, 0.8, groups, dtype=torch.float64)
    basis = torch.linalg.qr(normal(size, groups)).Q
    noise = NOISE * normal(size)
    # Noise beside the columns only: the effects alone decide the inclusion probabilities.
    noise = noise - basis @ (basis.mT @ noise)
    shared = normal(size, 1)
    correlated = 3 * (0.6**0.5 * shared + 0.4**0.5 * normal(size, groups)) / size**0.5
    return {
        "orthogonal": Regression(3 * basis, 3 * basis @ effects + noise),
        "correlated": Regression(correlated, correlated @ effects + noise),
    }


def measure(steps: int, particles: int, repeats: int) -> None:
    """Print a table for each design; errors of the relaxations are means over the repeats."""
    for name, problem in problems().items():
        exact = problem.inclusion()
        guide = Guide(problem)
        best = fit(guide, partial(exact_loss, problem, guide), 1000)
        print(f"\n{name} design; exact PIPs " + " ".join(f"{value:.2f}" for value in exact))
        print("| estimator | temperature | mean error | max error | mean to best | max to best |")
        print("|---|---|---|---|---|---|")
        report("exact gradient of the ELBO", "", best, exact, best)
        torch.manual_seed(0)
        guide = Guide(problem)
        score = ELBO(particles)
        found = fit(guide, partial(score.differentiable_loss, problem, guide), steps)
        report("score", "", found, exact, best)
        # Their gradients are pathwise: copies, one a temperature and repeat, do not interact.
        copies = replace(problem, copies=len(TEMPERATURES) * repeats)
        temperatures = torch.tensor(TEMPERATURES, dtype=torch.float64).repeat_interleave(repeats)
        for straight_through in (True, False):
            guide = Guide(copies, temperatures.unsqueeze(1), straight_through)
            relaxed = ELBO()
            found = fit(guide, partial(relaxed.differentiable_loss, copies, guide), 2 * steps)
            estimator = "straight-through" if straight_through else "soft"
            for temperature, part in zip(TEMPERATURES, found.split(repeats), strict=True):
                report(estimator, str(temperature), part, exact, best)


def report(estimator: str, temperature: str, found: Tensor, exact: Tensor, best: Tensor) -> None:
    """One row: absolute errors of the PIPs against the exact ones and the best of the family."""
    errors = [(found - target).abs() for target in (exact, best)]
    cells = [f"{float(e.mean()):.3f} | {float(e.max(1).values.mean()):.3f}" for e in errors]
    print(f"| {estimator} | {temperature} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="gradient steps of a fit by score")
    parser.add_argument("--particles", type=int, default=16, help="draws a step of the score")
    parser.add_argument("--repeats", type=int, default=20, help="fits of each relaxation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with pyro.validation_enabled(False):
        measure(arguments.steps, arguments.particles, arguments.repeats)
