"""Linear models whose posterior is known, and guides that are it, or deliberately are not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab


class ConjugateLinear:
    """y ~ N(Xβ, 0.5²), β ~ N(0, I): a normal posterior; float64."""

    noise = 0.5

    def __init__(self, size: int = 20, features: int = 3) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(size, features, generator=generator, dtype=torch.float64)
        beta = torch.randn(features, generator=generator, dtype=torch.float64)
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        self.y = self.x @ beta + self.noise * noise

    def model(self, y: Tensor | None = None) -> None:
        zero = torch.zeros(self.x.shape[1], dtype=torch.float64)
        beta = pyro.sample("beta", dist.Normal(zero, 1.0).to_event(1))
        pyro.sample("y", dist.Normal(self.x @ beta, self.noise).to_event(1), obs=y)

    def posterior(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance."""
        precision = self.x.T @ self.x / self.noise**2 + torch.eye(self.x.shape[1]).double()
        covariance = torch.linalg.inv(precision)
        return covariance @ self.x.T @ y / self.noise**2, covariance

    def log_evidence(self, y: Tensor) -> float:
        covariance = self.x @ self.x.T + self.noise**2 * torch.eye(len(y)).double()
        return float(dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y))

    def guide(self, y: Tensor, scale: float = 1.0, shift: float = 0.0):
        """The posterior, with standard deviations times ``scale`` and means moved by ``shift`` of
        them.
        """
        mean, covariance = self.posterior(y)
        law = dist.MultivariateNormal(
            mean + shift * covariance.diagonal().sqrt(), scale**2 * covariance
        )
        return lambda *args: pyro.sample("beta", law)


class Separable:
    """y_j ~ N(β_j, 0.5²), β_j spike-and-slab: the posterior is a product; float64."""

    noise, inclusion = 0.5, 0.3

    def __init__(self) -> None:
        self.y = torch.tensor([0.0, 0.4, 0.7, 1.0, 1.4, 2.5], dtype=torch.float64)

    def law(self, loc, scale, logits, cls=SpikeAndSlab, **options):
        slab = dist.Normal(loc.unsqueeze(1), torch.full_like(loc, scale).unsqueeze(1)).to_event(1)
        return cls(logits=logits, slab=slab, **options).to_event(1)

    def model(self) -> None:
        zero = torch.zeros_like(self.y)
        logit = math.log(self.inclusion) - math.log1p(-self.inclusion)
        beta = pyro.sample("beta", self.law(zero, 1.0, torch.full_like(zero, logit)))
        law = dist.Normal(beta.squeeze(1), self.noise).to_event(1)
        pyro.sample("y", law, obs=self.y)

    def log_marginal(self, slab: float) -> Tensor:
        """log p(y_j) with a slab of this standard deviation."""
        scale = torch.tensor(slab**2 + self.noise**2, dtype=torch.float64).sqrt()
        return dist.Normal(torch.zeros_like(scale), scale).log_prob(self.y)

    def logits(self) -> Tensor:
        """Exact posterior log odds of inclusion."""
        odds = math.log(self.inclusion / (1 - self.inclusion))
        return self.log_marginal(1.0) - self.log_marginal(0.0) + odds

    def log_evidence(self) -> float:
        out = self.log_marginal(0.0) + math.log1p(-self.inclusion)
        return float((out + torch.nn.functional.softplus(self.logits())).sum())

    def guide(self, scale: float = 1.0, odds: float = 1.0, relaxed: bool = True):
        """The posterior; slab scales times ``scale``, log odds plus log ``odds``."""
        shrink = 1 / (1 + self.noise**2)
        cls = RelaxedSpikeAndSlab if relaxed else SpikeAndSlab
        options = {"temperature": 0.5} if relaxed else {}
        law = self.law(
            shrink * self.y,
            scale * self.noise * shrink**0.5,
            self.logits() + math.log(odds),
            cls,
            **options,
        )
        return lambda: pyro.sample("beta", law)


@pytest.fixture
def conjugate() -> ConjugateLinear:
    return ConjugateLinear()


@pytest.fixture
def separable() -> Separable:
    return Separable()
