"""Hand-written Pyro models and guides, against a posterior that is known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sparse.distributions import MarkovChain, RelaxedSpikeAndSlab, SpikeAndSlab
from pyro_sparse.posterior import Posterior, SitePosterior

Y = torch.tensor([0.3, -1.5, 2.5])
PRIOR, SLAB, NOISE = 0.4, 1.5, 0.8


def model(x, y=None):
    beta = pyro.sample("beta", SpikeAndSlab(PRIOR, dist.Normal(0.0, SLAB).expand([3])).to_event(1))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(x * beta, NOISE), obs=y)


def exact():
    """Posterior inclusion, and mean and deviation of what is in; x is 1."""
    there, absent = (
        dist.Normal(0.0, (NOISE**2 + spread) ** 0.5).log_prob(Y) for spread in (SLAB**2, 0.0)
    )
    logits = there - absent + torch.logit(torch.tensor(PRIOR))
    variance = 1 / (NOISE**-2 + SLAB**-2)
    return logits, variance * Y / NOISE**2, variance**0.5


def function(x, y=None):
    logits, mean, std = exact()
    law = RelaxedSpikeAndSlab(0.5, logits=logits, slab=dist.Normal(mean, std))
    pyro.sample("beta", law.to_event(1))


class Module(nn.Module):
    def forward(self, x, y=None):
        function(x, y)


@pytest.fixture(params=[function, Module()], ids=["function", "module"])
def posterior(request):
    return SitePosterior(model, request.param, torch.ones(3), Y)


def test_sites_of_an_exact_guide(posterior):
    logits, mean, std = exact()
    inclusion = logits.sigmoid()
    assert posterior.inclusion(2)["beta"] == pytest.approx(inclusion.double())
    draws = posterior.draws(1000)["beta"]
    assert (draws == 0).double().mean(0) == pytest.approx((1 - inclusion).double(), abs=0.05)
    table = posterior.summary()
    assert table["inclusion"].tolist() == pytest.approx(inclusion.tolist())
    assert table["mean"].tolist() == pytest.approx((inclusion * mean).tolist(), abs=0.15)
    assert posterior.khat(num_samples=300).joint < 0.5  # constant weights

    predicted = posterior.predictive(2 * torch.ones(3), num_samples=1000)["y"]
    assert predicted.shape == (1000, 3)
    assert predicted.mean(0) == pytest.approx(2 * inclusion * mean, abs=0.2)
    moved = posterior.contraction(1000)["beta"]
    second = inclusion * (std**2 + mean**2) - (inclusion * mean) ** 2
    expected = 1 - second / (PRIOR * SLAB**2)
    assert moved.contraction == pytest.approx(expected.double(), abs=0.25)
    data = posterior.to_arviz(20)
    assert data["posterior"]["beta"].shape == (1, 20, 3)
    assert data["posterior_predictive"]["y"].shape == (1, 20, 3)
    assert data["prior"]["beta"].shape == (1, 20, 3)


def test_predictions_for_another_number_of_rows():
    """The guide's plates are of the data it was fitted to, and are nothing that is predicted by."""

    def rows(x, y=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean * x, 0.1), obs=y)

    def subsampling(x, y=None):
        pyro.plate("data", len(x))
        pyro.sample("mean", dist.Normal(2.0, 0.01))

    posterior = SitePosterior(rows, subsampling, torch.ones(3), Y)
    predicted = posterior.predictive(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), num_samples=50)
    assert set(predicted) == {"y"}
    assert predicted["y"].mean(0) == pytest.approx(torch.arange(1, 6) * 2.0, abs=0.1)
    assert set(posterior.contraction(20)) == {"mean"}


def test_inclusions_below_other_sites_are_averaged():
    chain = MarkovChain(torch.tensor(0.5), torch.tensor([[-1.0, 1.0], [0.0, 2.0]]))

    def nested():
        share = pyro.sample("share", dist.Beta(2.0, 6.0))
        pyro.sample("w", SpikeAndSlab(share, dist.Normal(0.0, 1.0)))
        pyro.sample("s", chain)

    torch.manual_seed(0)
    found = SitePosterior(nested, nested).inclusion(1000)
    assert found["w"] == pytest.approx(0.25, abs=0.02)
    assert found["s"] == pytest.approx(chain.mean.double())
    assert "share" not in found


def test_a_network_posterior_says_what_plain_models_have():
    with pytest.raises(ValueError, match="SitePosterior"):
        Posterior(model, function)
