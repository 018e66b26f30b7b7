"""Spike-and-slab regressions: how far inclusion probabilities end from the exact ones.

    python -m benchmarks.regression few    # 12 columns, against enumeration: sampler and guides
    python -m benchmarks.regression many   # 50 and 1000 columns, against a long chain

Columns are equicorrelated normals, effects are drawn from the prior (three of 12 columns, five of
more, twice the noise's standard error of a mean each), noise 1 is known. Guides are hand-written
for the model of a hand-written regression, with Adam on the exact objective from several starts.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_sparse as ps

ROWS = {12: 100, 50: 300, 1000: 300}
PRIOR = 0.25


def regression(columns: int, correlation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Data as the module's docstring says, in float64."""
    generator = torch.Generator().manual_seed(1000 * columns + seed)
    rows = ROWS[columns]
    own, shared = (
        torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in (columns, 1)
    )
    x = math.sqrt(1 - correlation) * own + math.sqrt(correlation) * shared
    beta = torch.zeros(columns, dtype=torch.float64)
    chosen = torch.randperm(columns, generator=generator)[: 3 if columns == 12 else 5]
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    beta[chosen] = 3 / math.sqrt(rows) * signs[: len(chosen)] / math.sqrt(1 - correlation)
    return x, x @ beta + torch.randn(rows, generator=generator, dtype=torch.float64)


def model(x: Tensor, y: Tensor) -> None:
    """The regression as a Pyro model, without an intercept."""
    slab = dist.Normal(x.new_zeros(x.shape[1]), 1.0)
    beta = pyro.sample("beta", ps.distributions.SpikeAndSlab(PRIOR, slab).to_event(1))
    pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)


class Independent(nn.Module):
    """q(z, w) = Π q(z_j) q(w_j | z_j), the family of this package's guides."""

    def __init__(self, columns: int, relaxed: bool) -> None:
        super().__init__()
        self.loc = nn.Parameter(0.1 * torch.randn(columns, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.full((columns,), -2.0, dtype=torch.float64))
        self.logits = nn.Parameter(torch.randn(columns, dtype=torch.float64))
        self.relaxed = relaxed

    def forward(self, x: Tensor, y: Tensor) -> None:
        slab = dist.Normal(self.loc, self.log_scale.exp())
        laws = ps.distributions
        law = (
            laws.RelaxedSpikeAndSlab(0.5, logits=self.logits, slab=slab)
            if self.relaxed
            else laws.SpikeAndSlab(logits=self.logits, slab=slab)
        )
        pyro.sample("beta", law.to_event(1))

    def inclusion(self) -> Tensor:
        return self.logits.detach().sigmoid()


def fitted(make: Callable[[], nn.Module], x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, float]:
    """Inclusion probabilities of one fit, and its bound."""
    torch.manual_seed(seed)
    guide, steps = make(), 800
    loss = ps.infer.ELBO(num_particles=4)(model, guide)
    adam = torch.optim.Adam(guide.parameters(), lr=0.03)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, 0.03 ** (1 / steps))
    for _ in range(steps):
        adam.zero_grad()
        loss(x, y).backward()
        adam.step()
        decay.step()
    with torch.no_grad():
        bound = -sum(float(loss(x, y)) for _ in range(200)) / 200
    return guide.inclusion(), bound


def guides(columns: int) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names and makers."""
    yield "independent, straight-through", lambda: Independent(columns, relaxed=True)
    yield "independent, score", lambda: Independent(columns, relaxed=False)


def few(seeds: int, restarts: int) -> None:
    """Twelve columns, against all 4096 supports."""
    options = {
        "likelihood": ps.likelihoods.Normal(1.0), "inclusion": PRIOR, "intercept": False,
    }  # fmt: skip
    for correlation in (0.0, 0.5, 0.9):
        error: dict[str, list[float]] = {}
        for seed in range(seeds):
            x, y = regression(12, correlation, seed)
            exact = ps.infer.enumerate_supports(x, y, **options).inclusion

            def note(name: str, found: Tensor, exact: Tensor = exact, error: dict = error) -> None:
                error.setdefault(name, []).append(float((found - exact).abs().mean()))

            note("sampler", ps.infer.gibbs(x, y, **options).inclusion)
            for name, make in guides(12):
                fits = [fitted(make, x, y, restart) for restart in range(restarts)]
                weights = torch.tensor([bound for _, bound in fits]).softmax(0)
                note(name, fits[0][0])
                mixed = sum(w * inclusion for w, (inclusion, _) in zip(weights, fits, strict=True))
                note(f"{name}, {restarts} restarts mixed", mixed)
        for name, values in error.items():
            mean, worst = sum(values) / len(values), max(values)
            print(
                f"ρ {correlation}  {name:48s} {mean:.4f}, worst of {seeds}: {worst:.4f}", flush=True
            )


def many(seeds: int) -> None:
    """More columns than can be enumerated, against a chain that is sixteen times as long."""
    options = {
        "likelihood": ps.likelihoods.Normal(), "inclusion": dist.Beta(1.0, 9.0),
    }  # fmt: skip
    for columns in (50, 1000):
        for correlation in (0.0, 0.5, 0.9):
            for seed in range(seeds):
                x, y = regression(columns, correlation, seed)
                start = time.process_time()
                found = ps.infer.gibbs(x, y, **options)
                seconds = time.process_time() - start
                long = ps.infer.gibbs(
                    x, y, num_samples=8000, warmup=2000, num_chains=4, seed=1, **options
                )  # fmt: skip
                error = (found.inclusion - long.inclusion).abs()
                print(
                    f"p {columns}  ρ {correlation}  mean error {error.mean():.5f}, most "
                    f"{error.max():.4f}, R-hat {found.rhat.nan_to_num(1.0).max():.3f} (long "
                    f"{long.rhat.nan_to_num(1.0).max():.3f}), {seconds:.0f} s of one core, "
                    f"expected size {found.inclusion.sum():.1f}", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("few", "many"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--restarts", type=int, default=4)
    torch.set_num_threads(1)
    given = parser.parse_args()
    few(given.seeds, given.restarts) if given.what == "few" else many(given.seeds)
