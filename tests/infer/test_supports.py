"""The chain over supports against enumeration; what `fit` keeps of it."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import pyro_sparse as ps
from pyro_sparse.infer.supports import Linearised, _Swept, linearised, support_chain

LOGIT = math.log(0.3 / 0.7)


def evidence(law, support):
    """log p(y | support) up to a constant, from the definition."""
    chosen = np.isin(law.owner, np.flatnonzero(support))
    precision = np.eye(chosen.sum()) + law.gram[np.ix_(chosen, chosen)]
    moment = law.moment[chosen]
    return 0.5 * moment @ np.linalg.solve(precision, moment) - 0.5 * np.linalg.slogdet(precision)[1]


def enumerated(law, inputs, logit=LOGIT):
    supports = np.array(list(itertools.product([0, 1], repeat=inputs)), bool)
    logs = np.array([evidence(law, one) + logit * one.sum() for one in supports])
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    return weights @ supports, weights, supports


def data(correlation, inputs=6, rows=60, seed=0):
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal((rows, 1))
    own = generator.standard_normal((rows, inputs))
    x = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    return x, x[:, 0] * 0.5 + generator.standard_normal(rows)


@pytest.mark.parametrize("width", [1, 2])
def test_chain_has_the_enumerated_probabilities(width):
    x, y = data(0.9, 5 * width)
    owner = np.repeat(np.arange(5), width)
    law = Linearised(0.25 * x.T @ x, 0.5 * x.T @ y, owner)
    exact, weights, supports = enumerated(law, 5)
    found = support_chain(law, torch.full((5,), LOGIT), sweeps=3000)
    assert np.abs(found.probability.numpy() - exact).max() < 0.02
    pairs = found.draws.double().T @ found.draws.double() / len(found.draws)
    both = (supports * weights[:, None]).T @ supports.astype(float)
    assert np.abs(pairs.numpy() - both).max() < 0.05


def linear(x, y):
    net = nn.Sequential(nn.Linear(x.shape[1], 1, bias=False))
    model = ps.models.SpikeSlabGaussian(
        net, x[:2], likelihood=ps.likelihoods.Normal(1.0), num_data=len(x), output_scale=0.5,
        prune_inputs=True, input_inclusion_probability=0.3,
    )  # fmt: skip
    return model, ps.guides.for_model(model)


def test_of_a_linear_network_nothing_is_approximated():
    x, y = data(0.9)
    model, guide = linear(torch.tensor(x).float(), torch.tensor(y).float())
    law = linearised(model, guide, torch.tensor(x).float(), torch.tensor(y).float())
    assert np.allclose(law.gram, 0.25 * x.T @ x, rtol=1e-4, atol=1e-3)
    assert np.allclose(law.moment, 0.5 * x.T @ y, rtol=1e-4, atol=1e-3)


def test_what_is_not_gated_is_integrated_out():
    """A bias: as if the centred columns were regressed with the bias' own prior."""
    x, y = (torch.tensor(value).float() for value in data(0.5))
    net = nn.Sequential(nn.Linear(6, 1))
    model = ps.models.SpikeSlabGaussian(
        net, x[:2], likelihood=ps.likelihoods.Normal(1.0), num_data=len(x), prune_inputs=True
    )
    law = linearised(model, ps.guides.for_model(model), x, y + 3)
    covariance = torch.eye(60) + torch.ones(60, 60)
    inverse = torch.linalg.inv(covariance)
    assert np.allclose(law.gram, x.T @ inverse @ x, rtol=1e-3, atol=1e-2)
    assert np.allclose(law.moment, x.T @ inverse @ (y + 3), rtol=1e-3, atol=1e-2)


def test_fit_keeps_what_the_chain_says_until_the_guide_moves():
    x, y = data(0.9)
    features, targets = torch.tensor(x).float(), torch.tensor(y).float()
    model, guide = linear(features, targets)
    loader = ps.data.Batches(features, targets, 60)
    ps.fit(model, guide, loader, epochs=30, progress=False)
    posterior = ps.Posterior(model, guide)
    exact, *_ = enumerated(Linearised(0.25 * x.T @ x, 0.5 * x.T @ y, np.arange(6)), 6)
    assert np.abs(posterior.inclusion()["input"].numpy() - exact).max() < 0.03
    group = posterior.summary().groups[0]
    assert group.expected == pytest.approx(exact.sum(), abs=0.1)
    objective = posterior.objective()
    assert objective.chain
    assert objective.settled
    assert objective.estimator == "trapezium"
    apart = (posterior.inclusion()["input"] - posterior.guide_inclusion()["input"]).abs().max()
    assert 0 < objective.apart == pytest.approx(float(apart))
    assert f"at most {objective.apart:.2f} away" in str(posterior.summary())
    with torch.no_grad():
        guide.input_gate.inclusion_logits += 1.0
    assert not posterior.objective().chain
    assert torch.equal(posterior.inclusion()["input"], posterior.guide_inclusion()["input"])


def test_the_objective_of_stopped_logits_is_told():
    x, y = (torch.tensor(value).float() for value in data(0.5))
    model, guide = linear(x, y)
    ps.fit(
        model, guide, ps.data.Batches(x, y, 60), epochs=20, progress=False,
        kl_weight=lambda progress: 0.1 + 0.9 * progress,
        inclusion_schedule=lambda progress: float(progress < 0.5),
    )  # fmt: skip
    objective = ps.Posterior(model, guide).objective()
    assert not objective.settled
    assert objective.kl_weight == pytest.approx(0.1 + 0.9 * 9 / 20)
    assert "KL weight of 0.5" in str(ps.Posterior(model, guide).summary())


def test_rounding_does_not_grow_over_many_flips():
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((400, 2)) @ generator.standard_normal((2, 10))
    inputs += 0.3 * generator.standard_normal((400, 10))
    slopes = 0.3 * (1 + 0.5 * generator.standard_normal((400, 4)))
    rows = (inputs[:, :, None] * slopes[:, None, :]).reshape(400, 40)
    law = Linearised(rows.T @ rows, rows.T @ inputs[:, 0], np.arange(10).repeat(4))
    swept, flips = _Swept(law, 10), generator.integers(10, size=199)
    for i in flips:
        swept.flip(int(i))
    out = ~np.isin(law.owner, np.flatnonzero(swept.inside))
    whole = law.gram + np.eye(40)
    left = np.linalg.solve(whole[np.ix_(~out, ~out)], whole[np.ix_(~out, out)])
    exact = whole[np.ix_(out, out)] - whole[np.ix_(out, ~out)] @ left
    np.testing.assert_allclose(swept._matrix[:40, :40][np.ix_(out, out)], exact, atol=1e-9)
