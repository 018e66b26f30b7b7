"""Recorded steps of any Pyro model beside stock SVI: the same losses and parameters."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI as StockSVI
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_sparse.infer import ELBO, SVI

STEPS = 60


@pytest.fixture(autouse=True)
def _own_store():
    with pyro.get_param_store().scope():
        yield


def regression(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, noise), obs=y)


def mean_field(x, y):
    loc = pyro.param("loc", torch.zeros(3))
    scale = pyro.param("scale", torch.ones(3), dist.constraints.positive)
    pyro.sample("weights", dist.Normal(loc, scale).to_event(1))
    noise = pyro.param("of noise", torch.tensor([0.0, 0.3]))
    pyro.sample("noise", dist.LogNormal(noise[0], noise[1].abs()))


def subsampled(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=7) as chosen:
        pyro.sample("y", dist.Normal(x[chosen, 0] * slope, 1.0), obs=y[chosen])


def of_subsampled(x, y):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("slope", dist.Normal(loc, 0.1))
    pyro.plate("data", len(x), subsample_size=7)


class Autoencoder(nn.Module):
    """Amortised: modules registered by ``pyro.module``, a latent for every row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))

    def model(self, x, y):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x, y):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        self.layer.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def pair(name):
    if name == "autoencoder":
        both = Autoencoder()
        return both.model, both.guide
    if name == "modules":
        model = Bayesian()
        torch.manual_seed(3)
        return model, AutoLowRankMultivariateNormal(model, rank=1)
    return {"functions": (regression, mean_field), "subsample": (subsampled, of_subsampled)}[name]


def data(rows=20):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator)
    return x, x[:, 0] + 0.3 * torch.randn(rows, generator=generator)


def trained(make, name, optim, *args):
    with pyro.get_param_store().scope():
        svi = make(*pair(name), optim)
        pyro.set_rng_seed(5)
        losses = [svi.step(*args) for _ in range(STEPS)]
        values = {key: value.detach().clone() for key, value in pyro.get_param_store().items()}
    return losses, values, svi


@pytest.mark.parametrize("kind", ["adam", "clipped", "by parameter"])
@pytest.mark.parametrize("name", ["functions", "subsample", "autoencoder", "modules"])
def test_same_as_stock(name, kind):
    def optim():
        return {
            "adam": lambda: pyro.optim.Adam({"lr": 0.02}),
            "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99, "clip_norm": 3.0}),
            "by parameter": lambda: pyro.optim.SGD(
                lambda name: {"lr": 1e-3 if "loc" in name else 1e-4}
            ),
        }[kind]()

    args = data()
    stock, values, _ = trained(lambda m, g, o: StockSVI(m, g, o, ELBO()), name, optim(), *args)
    losses, own, svi = trained(SVI, name, optim(), *args)
    assert svi.reason is None
    assert all(len(taped._trusted) == 1 for taped in svi._tapes.values())
    assert losses == pytest.approx(stock, rel=1e-4, abs=1e-3)
    assert own.keys() == values.keys()
    for key, value in values.items():
        torch.testing.assert_close(own[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_same_as_pyros_own_elbo():
    args, optim = data(), {"lr": 0.02}
    stock, *_ = trained(
        lambda m, g, o: StockSVI(m, g, o, TraceMeanField_ELBO()),
        "functions",
        pyro.optim.Adam(optim),
        *args,
    )
    losses, *_ = trained(SVI, "functions", pyro.optim.Adam(optim), *args)
    assert losses == pytest.approx(stock, rel=1e-4)


def test_batches_of_other_sizes_and_numbers_among_the_arguments():
    def model(x, y, scale=1.0):
        with pyro.poutine.scale(scale=scale):
            regression(x, y)

    def guide(x, y, scale=1.0):
        mean_field(x, y)

    def run(make):
        with pyro.get_param_store().scope():
            svi = make(model, guide, pyro.optim.Adam({"lr": 0.02}), ELBO())
            pyro.set_rng_seed(5)
            return [
                svi.step(*data(rows), scale=scale)
                for _ in range(30)
                for rows in (20, 11)
                for scale in (1.0, 0.5)
            ]

    assert run(SVI) == pytest.approx(run(StockSVI), rel=1e-4)


def test_a_parameter_that_comes_later_moves():
    calls = []

    def guide(x, y):
        calls.append(len(x))
        if len(x) > 15:
            loc = pyro.param("of larger ones", torch.zeros(3))
        else:
            loc = pyro.param("of smaller ones", torch.zeros(3))
        pyro.sample("weights", dist.Normal(loc, 0.1).to_event(1))
        pyro.sample("noise", dist.LogNormal(0.0, 0.1))

    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.02}))
    for _ in range(40):
        svi.step(*data(20))
        svi.step(*data(10))
    assert pyro.param("of larger ones")[0] > 0.2
    assert pyro.param("of smaller ones")[0] > 0.2
    assert len(calls) < 80  # some steps ran without Python


def test_arguments_that_are_no_tensors():
    """The first argument of a plain model need not be a batch of inputs."""

    def model(scales, x, y):
        with pyro.plate("data", len(x)):
            weight = pyro.sample("weight", dist.Normal(0.0, scales[0]))
            pyro.sample("y", dist.Normal(x[:, 0] * weight, scales[1]), obs=y)

    def guide(scales, x, y):
        loc = pyro.param("loc", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("weight", dist.Normal(loc, 0.1))

    for scales in ([1.0, 0.5], (1.0, 0.5), {0: 1.0, 1: 0.5}):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}))
        losses = [svi.step(scales, *data()) for _ in range(STEPS)]
        assert losses[-1] < losses[0]
        assert svi.reason is None
        pyro.clear_param_store()


def test_what_cannot_be_recorded_runs_as_it_is():
    def peeking(x, y):
        mean_field(x, y)
        if float(pyro.param("loc").detach()[0]) > 1e6:
            raise AssertionError

    args = data()
    svi = SVI(regression, peeking, pyro.optim.Adam({"lr": 0.02}))
    first = svi.step(*args)
    for _ in range(STEPS):
        last = svi.step(*args)
    assert last < first
    assert "looks at the numbers" in svi.reason
    stock = SVI(regression, mean_field, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(30):
        stock.step(*args)
    assert "looks at the numbers" in stock.reason
    assert SVI(regression, mean_field, pyro.optim.Adam({}), tape=False).reason == "tape=False"
