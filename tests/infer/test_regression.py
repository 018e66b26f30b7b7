"""Regressions by enumeration and sampling, against integrals and evidences written out."""

import itertools
import math
import random

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats

from pyro_sparse.infer import enumerate_supports, gibbs
from pyro_sparse.infer.support_state import SupportState
from pyro_sparse.likelihoods import Bernoulli, Categorical, Normal, Poisson


def regression(columns, correlation=0.0, rows=80, seed=0, effects=(0.5, -0.3, 0.4)):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(rows, 1))
    x = math.sqrt(1 - correlation) * rng.normal(size=(rows, columns))
    x = x + math.sqrt(correlation) * shared
    beta = np.zeros(columns)
    beta[: len(effects)] = effects
    return x, x @ beta + rng.normal(size=rows) + 2.0


# -- enumeration -----------------------------------------------------------------------------------


def evidence(x, y, slab_scale, noise_scale):
    """log p(y) of centred data, from the covariance of the n - 1 numbers that are left."""
    basis = np.linalg.svd(np.eye(len(y)) - 1 / len(y))[0][:, :-1]
    x, y = basis.T @ x, basis.T @ y
    covariance = slab_scale**2 * x @ x.T + noise_scale**2 * np.eye(len(y))
    return stats.multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)


def by_hand(x, y, log_evidence, prior):
    supports = list(itertools.product([False, True], repeat=x.shape[1]))
    log_joint = np.array(
        [
            log_evidence(x[:, list(support)])
            + sum(math.log(prior if inside else 1 - prior) for inside in support)
            for support in supports
        ]
    )
    probability = np.exp(log_joint - np.logaddexp.reduce(log_joint))
    return probability @ np.array(supports, dtype=float), np.logaddexp.reduce(log_joint)


def test_enumeration_with_known_noise():
    x, y = regression(4, 0.5, rows=12)
    exact, log_evidence = by_hand(x, y, lambda part: evidence(part, y, 0.7, 1.25), 0.3)
    found = enumerate_supports(x, y, likelihood=Normal(1.25), inclusion=0.3, slab_scale=0.7)
    assert found.inclusion.numpy() == pytest.approx(exact, abs=1e-10)
    # The flat prior's constant: ∫ N(ȳ; α, σ²/n) dα over what centring took away.
    assert found.log_evidence == pytest.approx(log_evidence - 0.5 * math.log(len(y)), abs=1e-9)


def test_enumeration_integrates_the_noise_out():
    x, y = regression(3, 0.5, rows=10)
    prior = stats.gamma(2.0, scale=1 / 1.5)

    def log_evidence(part):
        grid = np.linspace(-6, 4, 161)
        values = [
            evidence(part, y, 1.0, math.exp(-t / 2)) + prior.logpdf(math.exp(t)) + t for t in grid
        ]
        return math.log(integrate.simpson(np.exp(np.array(values) + 20), x=grid)) - 20

    exact, total = by_hand(x, y, log_evidence, 0.4)
    found = enumerate_supports(x, y, likelihood=Normal(shape=2.0, rate=1.5), inclusion=0.4)
    assert found.inclusion.numpy() == pytest.approx(exact, abs=1e-7)
    assert found.log_evidence == pytest.approx(total - 0.5 * math.log(len(y)), abs=1e-6)


def test_moments_of_coefficients_by_enumeration():
    x, y = regression(2, 0.5, rows=15, effects=(0.5,))
    found = enumerate_supports(x, y, likelihood=Normal(1.0), intercept=False)
    weights, means, squares = [], [], []
    for support in itertools.product([0, 1], repeat=2):
        chosen = np.flatnonzero(support)
        covariance = np.linalg.inv(x[:, chosen].T @ x[:, chosen] + np.eye(len(chosen)))
        mean = np.zeros(2)
        mean[chosen] = covariance @ x[:, chosen].T @ y
        square = mean**2
        square[chosen] += np.diag(covariance)
        marginal = x[:, chosen] @ x[:, chosen].T + np.eye(len(y))
        weights.append(stats.multivariate_normal(np.zeros(len(y)), marginal).pdf(y))
        means.append(mean)
        squares.append(square)
    weights = np.array(weights) / sum(weights)
    assert found.mean.numpy() == pytest.approx(weights @ means)
    variance = weights @ squares - (weights @ means) ** 2
    assert found.std.numpy() == pytest.approx(variance**0.5)
    assert found.probabilities.sum() == pytest.approx(1.0)


def test_priors_of_inclusion():
    """Columns of zeros say nothing: what comes out is the prior."""
    x, y = np.zeros((5, 3)), np.arange(5.0)
    each = enumerate_supports(x, y, likelihood=Normal(1.0), inclusion=torch.tensor([0.0, 0.2, 1.0]))
    assert each.inclusion.tolist() == pytest.approx([0.0, 0.2, 1.0])
    law = enumerate_supports(x, y, likelihood=Normal(1.0), inclusion=dist.Beta(1.0, 4.0))
    sizes = law.supports.sum(1)
    for size in range(4):  # Beta-binomial
        exact = stats.betabinom(3, 1.0, 4.0).pmf(size)
        assert law.probabilities[sizes == size].sum() == pytest.approx(exact)
    drawn = gibbs(
        x, y, likelihood=Normal(), inclusion=dist.Beta(1.0, 4.0), num_samples=500, warmup=10
    )
    assert drawn.inclusion.tolist() == pytest.approx([0.2] * 3, abs=0.03)
    both = drawn.co_inclusion(["x0", "x2"]).loc["x0", "x2"]
    assert both == pytest.approx(1 * 2 / (5 * 6), abs=0.025)


# -- the state of a chain --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_gains_are_differences_of_evidences(width, kept):
    rng = np.random.default_rng(2)
    units = 25
    x, tau = rng.normal(size=(30, units * width)), 1.7
    moment = x.T @ rng.normal(size=30)
    precision = rng.uniform(0.5, 2.0, (units, width))
    state = SupportState(x, width, x.T @ x if kept else None)

    def log_evidence(included):
        columns = np.flatnonzero(np.repeat(included, width))
        own = precision.ravel()[columns]
        k = x[:, columns].T @ x[:, columns] + np.diag(own)
        fit = moment[columns] @ np.linalg.solve(k, moment[columns])
        return 0.5 * (tau * fit - np.linalg.slogdet(k)[1] + np.log(own).sum())

    included = rng.random(units) < 0.1
    state.refresh(moment, precision, tau, included)
    for unit in rng.permutation(units)[:22]:  # more than there was room for
        state.flip(unit)
    included = state.included.copy()
    for unit in range(units):
        with_, without = included.copy(), included.copy()
        with_[unit], without[unit] = True, False
        gain = log_evidence(with_) - log_evidence(without)
        assert state.gains()[unit] == pytest.approx(gain, abs=1e-8)
    columns = state.columns(state.members)
    k = x[:, columns].T @ x[:, columns] + np.diag(precision.ravel()[columns])
    assert state.mean == pytest.approx(np.linalg.solve(k, moment[columns]))
    assert state.inverse == pytest.approx(np.linalg.inv(k), abs=1e-10)


# -- the sampler -----------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("likelihood", [Normal(1.0), Normal()], ids=["known", "gamma"])
def test_sampler_agrees_with_enumeration(correlation, likelihood):
    x, y = regression(12, correlation)
    options = {"likelihood": likelihood, "inclusion": 0.3}
    exact = enumerate_supports(x, y, **options)
    drawn = gibbs(x, y, num_samples=400, warmup=50, num_chains=2, **options)
    distance = (drawn.inclusion - exact.inclusion).abs()
    assert distance.mean() <= 0.01
    assert (distance <= 5 * drawn.inclusion_se + 1e-3).all()
    assert drawn.rhat.max() < 1.05
    assert drawn.ess.min() > 100
    spread = exact.std / drawn.ess.min() ** 0.5
    assert ((drawn.coefficients.mean((0, 1)) - exact.mean).abs() < 5 * spread).all()
    assert drawn.coefficients.flatten(0, 1).std(0).numpy() == pytest.approx(
        exact.std.numpy(), abs=0.02, rel=0.12
    )
    assert torch.equal(drawn.coefficients != 0, drawn.supports)
    assert drawn.intercept.mean() == pytest.approx(2.0, abs=0.5)


def test_near_copies_change_places():
    x, y = regression(6, rows=200)
    x[:, 1] = x[:, 0] + 0.02 * np.random.default_rng(1).normal(size=200)
    exact = enumerate_supports(x, y, likelihood=Normal(1.0), inclusion=0.1)
    drawn = gibbs(x, y, likelihood=Normal(1.0), inclusion=0.1, num_samples=400, num_chains=2)
    assert (drawn.inclusion - exact.inclusion).abs().max() < 0.04
    names = ["x0", "x1"]
    both = drawn.co_inclusion(names).to_numpy()
    assert both == pytest.approx(exact.co_inclusion(names).to_numpy(), abs=0.05)
    assert both[0, 1] < 0.5 * both[0, 0] * both[1, 1]


def test_groups_of_columns_share_one_inclusion():
    x, y = regression(7, 0.5)
    frame = pd.DataFrame(x, columns=list("abcdefg"))
    groups = ["one", "two", "one", "three", "two", "one", "four"]
    options = {"likelihood": Normal(1.0), "inclusion": 0.4, "groups": groups}
    exact = enumerate_supports(frame, pd.Series(y), **options)
    assert exact.names == ("one", "two", "three", "four")
    assert len(exact.supports) == 16

    def log_evidence(names):
        columns = [label in names for label in groups]
        return evidence(x[:, columns], y, 1.0, 1.0)

    prior = {True: math.log(0.4), False: math.log(0.6)}
    subsets = itertools.chain.from_iterable(
        itertools.combinations(exact.names, size) for size in range(5)
    )
    log_joint = {
        names: log_evidence(names) + sum(prior[name in names] for name in exact.names)
        for names in subsets
    }
    total = np.logaddexp.reduce(list(log_joint.values()))
    for unit, name in enumerate(exact.names):
        share = sum(math.exp(value - total) for names, value in log_joint.items() if name in names)
        assert float(exact.inclusion[unit]) == pytest.approx(share)
    drawn = gibbs(frame, pd.Series(y), num_samples=500, warmup=50, num_chains=2, **options)
    assert drawn.inclusion.numpy() == pytest.approx(exact.inclusion.numpy(), abs=0.03)
    assert drawn.coefficients.mean((0, 1)).numpy() == pytest.approx(exact.mean.numpy(), abs=0.04)
    assert drawn.columns == tuple("abcdefg")
    assert list(drawn.table().columns) == ["inclusion", "se", "rhat", "ess"]
    assert drawn.table()["inclusion"].is_monotonic_decreasing


def test_more_columns_than_rows():
    x, y = regression(300, rows=100, effects=(2.0, -2.0, 1.5))
    drawn = gibbs(
        x, y, likelihood=Normal(), inclusion=dist.Beta(1.0, 99.0), num_samples=60, warmup=60,
        num_chains=2,
    )  # fmt: skip
    assert (drawn.inclusion > 0.5).nonzero().flatten().tolist() == [0, 1, 2]


FAMILIES = {  # the mean, its slope and the log-likelihood as functions of η
    "bernoulli": (
        lambda eta: 1 / (1 + np.exp(-eta)),
        lambda mean: mean * (1 - mean),
        lambda eta, y: (eta * y - np.logaddexp(0, eta)).sum(-1),
    ),
    "poisson": (np.exp, lambda mean: mean, lambda eta, y: (eta * y - np.exp(eta)).sum(-1)),
}


def glm_evidence(x, y, family):
    """log ∫ p(y | α + xᵀβ) N(β; 0, 1) dα dβ up to a constant, on a grid around the mode."""
    inverse_link, slope, log_likelihood = FAMILIES[family]
    points, weights = np.polynomial.hermite_e.hermegauss(20)
    x = np.column_stack([np.ones(len(y)), x])
    size = x.shape[1]
    precision = np.diag([0.0] + [1.0] * (size - 1))
    mode = np.zeros(size)
    for _ in range(50):
        mean = inverse_link(x @ mode)
        hessian = x.T @ (x * slope(mean)[:, None]) + precision
        mode += np.linalg.solve(hessian, x.T @ (y - mean) - precision @ mode)
    root = np.linalg.inv(np.linalg.cholesky(hessian)).T
    nodes = np.array(list(itertools.product(points, repeat=size)))
    log_weight = np.log(list(itertools.product(weights, repeat=size))).sum(1)
    beta = mode + nodes @ root.T
    log_p = log_likelihood(beta @ x.T, y) + stats.norm.logpdf(beta[:, 1:]).sum(1)
    total = np.logaddexp.reduce(log_p + log_weight + 0.5 * (nodes**2).sum(1))
    return total + np.linalg.slogdet(root)[1]


@pytest.mark.parametrize(
    ("likelihood", "effects", "num_samples"),
    [(Bernoulli(), (1.0, 0.5), 600), (Poisson(), (0.3, 0.15), 250)],
    ids=FAMILIES,
)
def test_generalised_regressions_against_quadrature(likelihood, effects, num_samples):
    x, mean = regression(2, 0.5, rows=60, seed=3, effects=effects)
    rng = np.random.default_rng(4)
    family = type(likelihood).__name__.lower()
    y = (mean > 2.0).astype(float)
    if family == "poisson":
        y = rng.poisson(np.exp(0.3 + x @ np.array(effects))).astype(float)
    exact, _ = by_hand(x, y, lambda part: glm_evidence(part, y, family), 0.5)
    drawn = gibbs(x, y, likelihood=likelihood, num_samples=num_samples, warmup=50, num_chains=2)
    assert exact.min() > 0.02
    assert exact.min() < 0.9
    assert ((drawn.inclusion - torch.tensor(exact)).abs() < 4 * drawn.inclusion_se + 0.01).all()
    assert drawn.inclusion_se.max() < 0.05
    assert drawn.noise_scale is None
    assert drawn.rhat.max() < 1.05


def test_counts_with_groups_and_a_law_of_their_probability():
    """Columns of zeros say nothing, and a group's second column that is 0 changes nothing."""
    x, _ = regression(3, rows=40)
    x[:, 1:] = 0.0
    y = np.random.default_rng(0).poisson(np.exp(1.0 + 0.5 * x[:, 0])).astype(float)
    drawn = gibbs(
        x, y, likelihood=Poisson(), inclusion=[1.0, 0.3], groups=["a", "b", "b"], warmup=20,
        num_samples=150, num_chains=2,
    )  # fmt: skip
    assert drawn.inclusion.tolist() == pytest.approx([1.0, 0.3], abs=0.1)
    assert drawn.coefficients[..., 0].mean() == pytest.approx(0.5, abs=0.3)


def test_seeds_decide_and_nothing_global_changes():
    x, y = regression(5)
    before = torch.random.get_rng_state(), random.getstate()
    one, two, three = (
        gibbs(x, y, likelihood=Normal(), num_samples=10, warmup=0, num_chains=2, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.coefficients, two.coefficients)
    assert not torch.equal(one.coefficients, three.coefficients)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(3)}, "a target for every row"),
        ({"y": torch.full((80,), math.nan)}, "not finite"),
        ({"x": torch.zeros(80)}, "2 axes"),
        ({"likelihood": Categorical()}, "Categorical"),
        ({"likelihood": Bernoulli()}, "0 or 1"),
        ({"inclusion": 1.5}, r"\[0, 1\]"),
        ({"inclusion": torch.ones(4)}, "each of 3 units"),
        ({"slab_scale": 0.0}, "positive slab_scale"),
        ({"groups": ["a"]}, "group for each of 3 columns"),
        ({"num_samples": 1}, "num_samples"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, y = regression(3)
    options = {"x": x, "y": y, "likelihood": Normal(), **change}
    with pytest.raises(ValueError, match=message):
        gibbs(options.pop("x"), options.pop("y"), **options)


def test_enumeration_refuses_what_it_cannot_do():
    x, y = regression(21, rows=30)
    with pytest.raises(ValueError, match="use gibbs"):
        enumerate_supports(x, y, likelihood=Normal())
    with pytest.raises(ValueError, match="use gibbs"):
        enumerate_supports(x[:, :2], (y > 2).astype(float), likelihood=Bernoulli())
    fixed = enumerate_supports(x, y, likelihood=Normal(), inclusion=[1.0] * 19 + [0.5] * 2)
    assert len(fixed.supports) == 4
    with pytest.raises(ValueError, match="no unit is named"):
        fixed.co_inclusion(["x99"])
