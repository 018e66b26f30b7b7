"""A step of `pyro_sparse.infer.SVI` beside one of stock SVI, on models as in Pyro's examples.

    python -m benchmarks.svi

Three models with small data: a Bayesian regression, a variational autoencoder on 8 × 8 digits, a
hierarchical model of counts. All run from one seed, with `TraceMeanField_ELBO` and `ELBO` of this
package; milliseconds are medians of CPU time over interleaved blocks of steps, after the steps that
are looked at before one is recorded. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI as StockSVI
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_sparse.infer import ELBO, SVI

Problem = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]


def regression() -> Problem:
    """A Bayesian linear regression of 200 rows and three inputs, in a PyroModule."""

    class Regression(PyroModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

        def forward(self, x: Tensor, y: Tensor) -> None:
            sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        positive = dist.constraints.positive
        loc = pyro.param("weight_loc", torch.zeros(1, 3))
        scale = pyro.param("weight_scale", torch.full((1, 3), 0.1), positive)
        pyro.sample("sigma", dist.LogNormal(pyro.param("level", torch.zeros(())), 0.1))
        pyro.sample("linear.weight", dist.Normal(loc, scale).to_event(2))
        bias = pyro.param("bias_loc", torch.zeros(1))
        spread = pyro.param("bias_scale", torch.full((1,), 0.1), positive)
        pyro.sample("linear.bias", dist.Normal(bias, spread).to_event(1))

    x = torch.randn(200, 3)
    return Regression(), guide, (x, x @ torch.tensor([1.0, -1.0, 0.5]) + 0.3 * torch.randn(200))


def autoencoder() -> Problem:
    """A variational autoencoder of scikit-learn's digits, batches of 128."""
    from sklearn.datasets import load_digits

    encoder = nn.Sequential(nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 20))
    decoder = nn.Sequential(nn.Linear(10, 64), nn.Softplus(), nn.Linear(64, 64))
    images = torch.tensor(load_digits().data[:128] > 7, dtype=torch.float32)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 10), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (images,)


def hierarchy() -> Problem:
    """Counts in 30 groups of 10, with a rate each and a common law of their logarithms."""
    rates = torch.randn(30, 1).mul(0.5).add(1.0).exp()
    counts = torch.poisson(rates.expand(30, 10))

    def model(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("groups", 30, dim=-2):
            rate = pyro.sample("rate", dist.Normal(level, spread).expand([30, 1]))
            with pyro.plate("counts", 10, dim=-1):
                pyro.sample("y", dist.Poisson(rate.exp()), obs=y)

    def guide(y: Tensor) -> None:
        positive = dist.constraints.positive
        scales = pyro.param("scales", torch.full((2,), 0.1), positive)
        locs = pyro.param("locs", torch.tensor([0.0, -1.0]))
        pyro.sample("level", dist.Normal(locs[0], scales[0]))
        pyro.sample("spread", dist.LogNormal(locs[1], scales[1]))
        loc = pyro.param("loc", torch.zeros(30, 1))
        scale = pyro.param("scale", torch.full((30, 1), 0.1), positive)
        with pyro.plate("groups", 30, dim=-2):
            pyro.sample("rate", dist.Normal(loc, scale))

    return model, guide, (counts,)


PROBLEMS = {
    "Bayesian regression": regression,
    "variational autoencoder": autoencoder,
    "hierarchical counts": hierarchy,
}
WAYS: dict[str, Callable[..., Any]] = {
    "stock": lambda model, guide, optim: StockSVI(model, guide, optim, TraceMeanField_ELBO()),
    "stock SVI, this ELBO": lambda model, guide, optim: StockSVI(model, guide, optim, ELBO()),
    "recorded": SVI,
}


def measured(make: Callable[[], Problem], blocks: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step by way, and the largest relative difference of losses."""
    runs: dict[str, Any] = {}
    for name, way in WAYS.items():
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope() as store:
            model, guide, args = make()
            svi = way(model, guide, pyro.optim.Adam({"lr": 1e-3}))
            pyro.set_rng_seed(1)
            losses = [svi.step(*args) for _ in range(50)]
        runs[name] = (svi, args, store, losses, [])
    for _ in range(blocks):
        for svi, args, store, _, times in runs.values():
            with pyro.get_param_store().scope(store):
                started = time.process_time()
                for _ in range(steps):
                    svi.step(*args)
                times.append((time.process_time() - started) / steps * 1e3)
    first = torch.tensor(runs["stock"][3])
    return {
        **{name: statistics.median(run[4]) for name, run in runs.items()},
        "difference": float(((torch.tensor(runs["recorded"][3]) - first) / first).abs().max()),
        "reason": runs["recorded"][0].reason,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50, help="of a block")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | stock SVI | stock SVI, `ELBO` | recorded | × stock | losses differ by |")
    print("|---|---|---|---|---|---|")
    for name, make in PROBLEMS.items():
        found = measured(make, options.blocks, options.steps)
        times = [found[way] for way in WAYS]
        print(
            f"| {name} | {times[0]:.2f} | {times[1]:.2f} | {times[2]:.2f} | "
            f"{times[0] / times[2]:.1f} | {found['difference']:.0e} |"
            + (f" {found['reason']}" if found["reason"] else "")
        )


if __name__ == "__main__":
    main()
