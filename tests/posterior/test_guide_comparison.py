"""Guides side by side, on a regression whose evidence and posterior are closed."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_sparse as ps

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X[:, 1] = 0.9 * X[:, 0] + 0.4 * X[:, 1]
Y = X[:, 0] + 0.5 * torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _own_store():
    with pyro.get_param_store().scope():
        yield


def model(x, y=None):
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 0.5), obs=y)


def mean_field(x, y=None):
    loc = pyro.param("loc", x.new_zeros(2))
    scale = pyro.param("scale", x.new_full((2,), 0.1), dist.constraints.positive)
    pyro.sample("weights", dist.Normal(loc, scale).to_event(1))


def point(x, y=None):
    loc = pyro.param("loc", x.new_zeros(2))
    pyro.sample("weights", dist.Delta(loc).to_event(1))


@pytest.fixture(scope="module")
def found():
    pyro.param("loc", torch.tensor(7.0))  # somebody else's
    with pyro.get_param_store().scope() as before:
        state = torch.get_rng_state()
        with pyro.validation_enabled(False):
            full = AutoMultivariateNormal(model, init_scale=0.1)
        comparison = ps.compare_guides(
            model, {"mean field": mean_field, "full": full, "point": point}, X, Y,
            steps=1500, num_particles=2,
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), state)
        assert dict(pyro.get_param_store()) == before.get("params", {}) or not dict(
            pyro.get_param_store()
        )
    return comparison


def test_bounds_against_the_evidence(found):
    exact = dist.MultivariateNormal(
        X.new_zeros(40), X @ X.T + 0.25 * torch.eye(40, dtype=torch.float64)
    ).log_prob(Y)
    precision = torch.eye(2, dtype=torch.float64) + X.T @ X / 0.25
    # KL of the best independent normals from the posterior.
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    table = found.table()
    assert table.loc["full", "elbo"] == pytest.approx(float(exact), abs=0.05)
    assert table.loc["mean field", "elbo"] == pytest.approx(float(exact - gap), abs=0.15)
    assert table.loc["mean field", "importance_weighted"] > table.loc["mean field", "elbo"]
    assert table.loc["point"].isna()["elbo"]
    assert table.loc["full", "khat"] < table.loc["mean field", "khat"]
    assert "mean field" in str(found)


def test_marginals(found):
    precision = torch.eye(2, dtype=torch.float64) + X.T @ X / 0.25
    mean = torch.linalg.solve(precision, X.T @ Y / 0.25)
    marginals = found.marginals(2000)
    assert marginals["full", "mean"].tolist() == pytest.approx(mean.tolist(), abs=0.03)
    spread = precision.inverse().diagonal().sqrt()
    assert marginals["full", "std"].tolist() == pytest.approx(spread.tolist(), rel=0.1)
    own = precision.diagonal().rsqrt()
    assert marginals["mean field", "std"].tolist() == pytest.approx(own.tolist(), rel=0.1)


def test_two_guides_with_one_name_for_their_parameters(found):
    first, second = (found.posteriors[name].draws(1)["weights"] for name in ("mean field", "point"))
    assert not torch.equal(first, second)
    assert len(found.losses["point"]) == 1500


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"guides": {}}, ValueError, "guides by name"),
        ({"guides": [mean_field]}, ValueError, "guides by name"),
        ({"steps": 0}, ValueError, "steps"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": 1e300}, FloatingPointError, "guide 'mine'"),
    ],
)
def test_refused(change, error, message):
    options = {"guides": {"mine": mean_field}, "steps": 30, "num_samples": 50, **change}
    with pytest.raises(error, match=message):
        ps.compare_guides(model, options.pop("guides"), X, Y, **options)


def test_models_that_would_train_with_every_guide():
    linear = nn.Linear(2, 1).double()

    def learns(x, y=None):
        pyro.module("linear", linear)
        weights = pyro.sample("weights", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(linear(x)[:, 0] + x @ weights, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"parameters of its own \(stored.linear"):
        ps.compare_guides(learns, {"mine": mean_field}, X, Y)
    network = ps.models.ReducibleGaussian(ps.nets.mlp([2, 2]), X[:2].float(), num_data=40)
    with pytest.raises(ValueError, match=r"pyro_sparse\.compare"):
        ps.compare_guides(network, {"mine": mean_field}, X, Y)


def test_autoguides_are_no_point_estimates_but_auto_delta_is():
    plain = {"normal": AutoNormal(model), "delta": AutoDelta(model)}
    found = ps.compare_guides(model, plain, X, Y, steps=50, num_samples=50)
    assert found.khats["normal"].without_evidence is None
    assert "point estimate" in found.khats["delta"].without_evidence
