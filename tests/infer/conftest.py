"""A sparse linear model whose posterior is known, and small networks of every kind."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_sparse import guides, models, nets
from pyro_sparse.data import Batches
from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab
from pyro_sparse.infer import Run, fit


class SparseLinear:
    """y ~ N(Σ_g X_g β_g, σ²), β_g spike-and-slab; everything about it in closed form, float64.

    design: (n, p, m), the columns of p groups
    """

    def __init__(self, design: Tensor, y: Tensor, *, inclusion=0.3, slab=1.0, noise=0.5) -> None:
        self.design, self.y = design.double(), y.double()
        self.inclusion, self.slab, self.noise = inclusion, slab, noise
        self.size, self.groups, self.length = design.shape

    def prior(self) -> SpikeAndSlab:
        scale = torch.tensor(self.slab, dtype=torch.float64)
        slab = dist.Normal(torch.zeros_like(scale), scale).expand((self.groups, self.length))
        probs = torch.full((self.groups,), self.inclusion, dtype=torch.float64)
        return SpikeAndSlab(probs=probs, slab=slab.to_event(1))

    def __call__(self) -> None:
        beta = pyro.sample("beta", self.prior().to_event(1))
        mean = torch.einsum("npm,pm->n", self.design, beta)
        pyro.sample("y", dist.Normal(mean, self.noise).to_event(1), obs=self.y)

    def posterior(self) -> tuple[float, Tensor]:
        """Log evidence and inclusion probabilities, by enumeration of all supports."""
        supports = torch.tensor(list(itertools.product([0.0, 1.0], repeat=self.groups))).double()
        gram = torch.einsum("npm,kpm->pnk", self.design, self.design)
        covariance = self.slab**2 * torch.einsum("sp,pnk->snk", supports, gram)
        covariance = covariance + self.noise**2 * torch.eye(self.size)
        marginal = dist.MultivariateNormal(torch.zeros_like(self.y), covariance)
        prior = supports * math.log(self.inclusion) + (1 - supports) * math.log1p(-self.inclusion)
        log_joint = marginal.log_prob(self.y) + prior.sum(1)
        return float(log_joint.logsumexp(0)), log_joint.softmax(0) @ supports

    def elbo(self, q: SpikeAndSlab) -> Tensor:
        """The evidence lower bound of a guide with a diagonal normal slab, in closed form."""
        gram = torch.einsum("npi,npj->pij", self.design, self.design)
        loc, variance, gate = q.slab.mean, q.slab.variance, q.probs
        residual = self.y - torch.einsum("npm,pm,p->n", self.design, loc, gate)
        # Of group g: γ tr(G diag σ²) + γ(1-γ) μᵀGμ.
        spread = gate * (gram.diagonal(dim1=1, dim2=2) * variance).sum(-1)
        spread = spread + gate * (1 - gate) * torch.einsum("pi,pij,pj->p", loc, gram, loc)
        misfit = (residual.square().sum() + spread.sum()) / self.noise**2
        expected = -0.5 * (misfit + self.size * math.log(2 * math.pi * self.noise**2))
        return expected - kl_divergence(q, self.prior()).sum()


class LinearGuide(nn.Module):
    """Spike-and-slab with a diagonal normal slab; the inclusion's estimator as asked for."""

    def __init__(self, problem: SparseLinear, temperature: float | None = None) -> None:
        super().__init__()
        shape = (problem.groups, problem.length)
        self.logits = nn.Parameter(torch.zeros(shape[0], dtype=torch.float64))
        self.loc = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.temperature = temperature

    def law(self) -> SpikeAndSlab:
        slab = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        if self.temperature is None:
            return SpikeAndSlab(logits=self.logits, slab=slab)
        return RelaxedSpikeAndSlab(self.temperature, logits=self.logits, slab=slab)

    def forward(self) -> None:
        pyro.sample("beta", self.law().to_event(1))

    def warm_start(self, problem: SparseLinear) -> None:
        """The slab at the estimates of an orthogonal design; the inclusions stay at ½."""
        squares = problem.design.square().sum(0)
        with torch.no_grad():
            self.loc.copy_(torch.einsum("npm,n->pm", problem.design, problem.y) / squares)
            self.log_scale.copy_(math.log(problem.noise) - 0.5 * squares.log())

    def randomise(self, scale: float = 1.0) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, scale)


@pytest.fixture
def linear_guide() -> type[LinearGuide]:
    return LinearGuide


@pytest.fixture
def linear_problem() -> Callable[..., SparseLinear]:
    """``linear_problem(groups, length, orthogonal)``: weak to strong effects, PIPs in between."""

    def make(groups: int, length: int, orthogonal: bool, size: int = 30) -> SparseLinear:
        generator = torch.Generator().manual_seed(1)
        design = torch.randn(size, groups * length, generator=generator, dtype=torch.float64)
        effects = torch.linspace(0, 0.8, groups, dtype=torch.float64)
        beta = effects.repeat_interleave(length) / math.sqrt(length)
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        if orthogonal:
            basis = torch.linalg.qr(design).Q
            # Noise beside the columns only: the effects alone decide the inclusion probabilities.
            design, noise = 3 * basis, noise - basis @ (basis.T @ noise)
        else:
            design = design + 1.5 * torch.randn(size, 1, generator=generator, dtype=torch.float64)
        return SparseLinear(design.reshape(size, groups, length), design @ beta + 0.5 * noise)

    return make


SPARSE = {
    "ss-ig": models.SpikeSlabGaussian,
    "ss-gl": models.SpikeSlabGroupLasso,
    "ss-ghs": models.SpikeSlabGroupHorseshoe,
}


@pytest.fixture
def classifier() -> Callable[..., tuple]:
    """``classifier(name, **guide options)``: model, guide, x and y of a tiny problem, float64."""

    def make(name: str, size: int = 24, **options) -> tuple:
        torch.manual_seed(3)
        x = torch.randn(size, 3)
        y = (x[:, 0] * x[:, 1] > 0).long()
        net = nets.mlp([3, 4, 2], activation="tanh")
        model = SPARSE[name](net, x[:1], num_data=2 * size, inclusion_probability=0.4)
        defaults = {"initial_inclusion": 0.7, "initial_scale": 0.3}
        guide = guides.for_model(model, **(defaults | options))
        return model.double(), guide.double(), x.double(), y

    return make


class Tiny:
    """A problem that trains in a fraction of a second, the same one each time."""

    CLASSES = {
        **SPARSE,
        "dense": models.Deterministic,
        "sbp": models.LogNormalNoise,
        "bmr": models.ReducibleGaussian,
        "bc-gnj": models.GroupNormalJeffreys,
        "bc-ghs": models.GroupHorseshoe,
    }

    @staticmethod
    def data(size: int = 60) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(size, 4, generator=generator)
        return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()

    def problem(self, name: str = "ss-ig", hidden: int = 5, **options) -> tuple:
        with torch.random.fork_rng([]):
            torch.manual_seed(7)
            net = nets.mlp([4, hidden, 2])
        model = self.CLASSES[name](net, torch.zeros(1, 4), num_data=60, **options)
        return model, guides.for_model(model)

    def train(self, model: nn.Module, guide: nn.Module, **options) -> Run:
        defaults = {"loader": Batches(*self.data(), 20, seed=1), "epochs": 3, "progress": False}
        return fit(model, guide, **(defaults | options))

    @staticmethod
    def state(guide: nn.Module) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in guide.named_parameters()}

    @staticmethod
    def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(
                one[name], other[name], rtol=0, atol=0, equal_nan=True, msg=name
            )

    @staticmethod
    def without_seconds(history: list[dict]) -> list[dict]:
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]

    @staticmethod
    def lines(folder: Path) -> list[dict]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()
