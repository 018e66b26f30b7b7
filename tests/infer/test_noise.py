"""The noise precision at its closed optimum, against quadrature and after training."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Gamma, kl_divergence

import pyro_sparse as ps
from pyro_sparse import guides, likelihoods, models
from pyro_sparse.infer.noise import NoiseOptimum

SHAPE, RATE = 1.5, 0.2


def linear(size=200, features=3, noise=0.2):
    x = torch.randn(size, features, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -0.5, 0.0]).double() + noise * torch.randn(size).double()
    likelihood = likelihoods.Normal(shape=SHAPE, rate=RATE).double()
    net = nn.Sequential(nn.Linear(features, 1)).double()
    model = models.ReducibleGaussian(net, x[:1], likelihood=likelihood, num_data=size)
    guide = guides.for_model(model)
    return model, guide, x, y


def squared_errors(guide, x, y):
    """E_q Σ (y − f)², in closed form."""
    (law,) = guide.offers()["gaussians"].laws.values()
    design = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    mean, variance = law.loc.detach().squeeze(0), law.variance.detach().squeeze(0)
    return float((y - design @ mean).square().sum() + (design.square() @ variance).sum())


def terms(law, squares, size):
    """What of the bound depends on q(β)."""
    expected_log = torch.digamma(law.concentration) - law.rate.log()
    prior = Gamma(torch.tensor(SHAPE).double(), torch.tensor(RATE).double())
    return float(0.5 * size * expected_log - 0.5 * law.mean * squares - kl_divergence(law, prior))


def test_the_optimum_against_quadrature():
    """The law ∝ exp E log p(y, β | w), normalised on a grid; half of the data stand for all."""
    model, guide, x, y = linear()
    optimum = NoiseOptimum(model, guide)
    optimum.see(x[:100], y[:100])
    optimum.settle(draws=300)
    law = guide.noise_precision()
    squares = 2 * squared_errors(guide, x[:100], y[:100])
    mean = (SHAPE + 100) / (RATE + squares / 2)
    grid = torch.linspace(0.3 * mean, 2.5 * mean, 4001, dtype=torch.float64)
    log = Gamma(SHAPE, RATE).log_prob(grid) + 100 * grid.log() - 0.5 * grid * squares
    density = (log - log.max()).exp()
    density = density / torch.trapezoid(density, grid)
    found = law.log_prob(grid).exp().detach()
    # The expected errors are by draws: to half a per cent.
    assert float(torch.trapezoid((found - density).abs(), grid)) < 0.1
    assert float(law.mean.detach()) == pytest.approx(mean, rel=0.01)


def test_nothing_else_is_better():
    model, guide, x, y = linear()
    optimum = NoiseOptimum(model, guide)
    optimum.see(x, y)
    optimum.settle(draws=300)
    with torch.no_grad():
        law, squares = guide.noise_precision(), squared_errors(guide, x, y)
    best = terms(law, squares, 200)
    for a, b in ((1.2, 1.0), (0.8, 1.0), (1.0, 1.2), (1.2, 1.2), (0.8, 0.8)):
        assert terms(Gamma(a * law.concentration, b * law.rate), squares, 200) < best


def test_training_ends_there():
    """Errors of 0.02 in 3000 targets: log β has to move by 8, and to within √(2 / 3000)."""
    model, guide, x, y = linear(3000, noise=0.02)
    loader = ps.data.Batches(x, y, 100)
    ps.fit(model, guide, loader, epochs=6, lr=3e-2, progress=False)
    with torch.no_grad():
        squares = squared_errors(guide, x, y)
        best = Gamma(SHAPE + torch.tensor(1500.0).double(), RATE + squares / 2)
        assert terms(best, squares, 3000) - terms(guide.noise_precision(), squares, 3000) < 1


def test_batches_that_came_last_and_nothing_to_do(monkeypatch):
    monkeypatch.setattr("pyro_sparse.infer.noise.ROWS", 50)
    model, guide, x, y = linear()
    optimum = NoiseOptimum(model, guide)
    optimum.settle()  # none was seen
    start = guide.noise_precision().mean.detach()
    assert float(start) == pytest.approx(1)
    for k in range(10):
        optimum.see(x[20 * k : 20 * k + 20], y[20 * k : 20 * k + 20])
    assert [len(one) for _, one in optimum._recent] == [20, 20, 20]
    assert torch.equal(optimum._recent[-1][1], y[-20:])
    optimum.forget()
    optimum.settle()
    assert torch.equal(guide.noise_precision().mean.detach(), start)
    fixed = models.ReducibleGaussian(
        nn.Sequential(nn.Linear(3, 1)), x[:1].float(), num_data=200,
        likelihood=likelihoods.Normal(0.3),
    )  # fmt: skip
    none = NoiseOptimum(fixed, guides.for_model(fixed))
    none.see(x, y)
    none.settle()
    assert math.isclose(float(fixed.likelihood.noise_scale), 0.3, rel_tol=1e-6)
