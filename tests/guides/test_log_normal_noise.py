"""The guide of SBP: its KL, what its means do to the network, noise by batch or by example."""

import math

import pyro.poutine as poutine
import pytest
import torch
from scipy import integrate
from torch import nn

from pyro_sparse import guides, models
from pyro_sparse.infer import ELBO, LocalReparameterisation
from pyro_sparse.modules import own_parameters
from pyro_sparse.nets import lenet5_caffe, mlp
from pyro_sparse.posterior import Posterior

LOCS = [-25.0, -20.0, -12.0, -3.0, -0.5, 0.0, 4.0]
LOG_SCALES = [-5.0, -3.0, -1.0, 0.0, 1.0, 3.0]


def build(net, example, guide_options=None, **options):
    model = models.LogNormalNoise(net, example, num_data=40, **options)
    return model, guides.for_model(model, **(guide_options or {}))


def set_noise(guide, name, loc, log_scale):
    noise = guide.noises[name]
    with torch.no_grad():
        noise.noise_loc.copy_(torch.as_tensor(loc))
        noise.noise_log_scale.copy_(torch.as_tensor(log_scale))


def kl_by_quadrature(loc, scale, low=-20.0, high=0.0):
    """log(b − a) minus the entropy of the truncated normal."""
    top = min(max(loc, low), high)
    slope = abs(top - loc) / scale**2
    unit = min(scale, 1 / slope) if slope else scale
    ends = max(low, top - 50 * unit), min(high, top + 50 * unit)

    def energy(x):
        return (x - top) * (x + top - 2 * loc) / (2 * scale**2)

    def integral(f):
        points = [top] if ends[0] < top < ends[1] else None
        return integrate.quad(f, *ends, points=points, epsabs=0, epsrel=1e-11, limit=400)[0]

    z = integral(lambda x: math.exp(-energy(x)))
    mean = integral(lambda x: energy(x) * math.exp(-energy(x))) / z
    return math.log(high - low) - mean - math.log(z)


@pytest.mark.parametrize("prior_scale", [None, 0.7])
def test_total_kl_against_quadrature(prior_scale):
    """Σ of the units' KL on the whole grid; point estimates pay their prior's density only."""
    grid = [(loc, log_scale) for loc in LOCS for log_scale in LOG_SCALES]
    x = torch.randn(4, 3, dtype=torch.float64)
    net = mlp([3, len(grid), 2]).double()
    model, guide = build(net, x, prior_scale=prior_scale, prune_inputs=True)
    set_noise(guide, "fc1", *(torch.tensor(part) for part in zip(*grid, strict=True)))
    set_noise(guide, "input", [-1.0, -2.0, -3.0], [-1.0, 0.0, 1.0])
    units = [kl_by_quadrature(loc, math.exp(log_scale)) for loc, log_scale in grid]
    inputs = [kl_by_quadrature(float(loc), math.exp(s)) for loc, s in ((-1, -1), (-2, 0), (-3, 1))]
    density = 0.0
    if prior_scale is not None:
        rows = torch.cat([family.loc.detach().flatten() for _, family in guide.layers()])
        prior = torch.distributions.Normal(0.0, torch.tensor(prior_scale, dtype=torch.float64))
        density = -float(prior.log_prob(rows).sum())
    with torch.no_grad(), own_parameters(model, guide):
        assert all(ELBO().analytic(model, guide, x, torch.zeros(4).long()).values())
        kl = ELBO().estimate(model, guide, x, torch.zeros(4).long()).kl
    assert float(kl) == pytest.approx(sum(units) + sum(inputs) + density, rel=1e-8)
    # What is pruned pays nothing, its weights neither.
    keep = torch.arange(len(grid)) % 2 == 0
    model.support.restrict({"fc1": keep, "input": torch.tensor([True, False, True])})
    if prior_scale is not None:
        rows = guide.row_families["fc1"].loc.detach()[~keep]
        density += float(prior.log_prob(rows).sum())
    with torch.no_grad(), own_parameters(model, guide):
        kl = ELBO().estimate(model, guide, x, torch.zeros(4).long()).kl
    assert float(kl) == pytest.approx(sum(units[::2]) + sum(inputs[::2]) + density, rel=1e-8)


# -- means -----------------------------------------------------------------------------------------


def test_means_move_into_weights():
    """The masked network is the network with θ at its mean, inputs included."""
    x = torch.randn(5, 3, dtype=torch.float64)
    net = mlp([3, 6, 4, 2], "tanh").double()
    model, guide = build(net, x, prune_inputs=True)
    for name, size in (("input", 3), ("fc1", 6), ("fc2", 4)):
        set_noise(guide, name, torch.linspace(-3, 0.5, size), torch.linspace(-2, 1, size))
    theta = {name: law.mean for name, law in guide.offers()["noise"].laws.items()}
    assert list(theta) == ["fc1", "fc2", "input"]
    assert all(((mean > 0) & (mean < 1)).all() for mean in theta.values())
    posterior = Posterior(model, guide)
    keep = {"fc1": torch.tensor([True, False, True, True, True, False])}
    with torch.no_grad():
        for mask in ({}, keep):
            hidden = torch.tanh(theta["fc1"] * net.fc1(x * theta["input"]))
            if mask:
                hidden = hidden * keep["fc1"]
            hidden = torch.tanh(theta["fc2"] * net.fc2(hidden))
            torch.testing.assert_close(posterior.masked(x, mask), net.out(hidden))
        rows = guide.mean_rows()
        weight = torch.cat([net.fc1.weight, net.fc1.bias.unsqueeze(1)], 1)
        torch.testing.assert_close(rows["fc1"], weight * theta["fc1"].unsqueeze(1))
        # The inputs' means go to the first layer's columns, not to its bias.
        parameters = posterior.mean_parameters()
        expected = net.fc1.weight * theta["fc1"].unsqueeze(1) * theta["input"]
        torch.testing.assert_close(parameters["fc1.weight"], expected)
        torch.testing.assert_close(parameters["fc1.bias"], net.fc1.bias * theta["fc1"])


def test_channels():
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    net = lenet5_caffe(widths=(3, 4, 5), size=16).double()
    model, guide = build(net, x)
    set_noise(guide, "conv1", [-1.0, -0.2, 0.0], [0.0, -1.0, 0.5])
    set_noise(guide, "conv2", [-1.0, -0.2, 0.0, -2.0], 0.0)
    theta = {name: law.mean for name, law in guide.offers()["noise"].laws.items()}
    with torch.no_grad():
        hidden = net.conv1(x) * theta["conv1"].reshape(3, 1, 1)
        for name, layer in list(net.named_children())[1:]:
            hidden = layer(hidden)
            if name in theta:
                hidden = hidden * theta[name].reshape(-1, *[1] * (hidden.dim() - 2))
        torch.testing.assert_close(Posterior(model, guide).masked(x, {}), hidden)


# -- errors ----------------------------------------------------------------------------------------


class First(nn.Module):
    """Something happens to the input before the first layer reads it."""

    def __init__(self, function):
        super().__init__()
        self.function, self.fc = function, mlp([3, 5, 2])

    def forward(self, x):
        return self.fc(self.function(x))


@pytest.mark.parametrize("example", [torch.randn(4, 3), torch.zeros(4, 3)], ids=["data", "zeros"])
def test_noisy_inputs_need_a_layer_that_reads_them(example):
    for function in (torch.tanh, torch.sigmoid):
        with pytest.raises(ValueError, match="prune_inputs=False"):
            build(First(function), example, prune_inputs=True)
        build(First(function), example)
    # θ is positive: a ReLU lets it through.
    build(First(torch.relu), example, prune_inputs=True)


@pytest.mark.parametrize(
    "bounds",
    [{"low": 0.0}, {"low": 1.0}, {"high": -20.0}, {"low": -math.inf}, {"high": math.nan}],
)
def test_bounds_out_of_order(bounds):
    with pytest.raises(ValueError, match="finite bounds with low < high"):
        build(mlp([3, 4, 2]), torch.zeros(2, 3), **bounds)


def test_other_bounds():
    model, guide = build(mlp([3, 4, 2]), torch.zeros(2, 3), low=-5.0, high=1.0)
    set_noise(guide, "fc1", 0.0, 9.0)
    law = guide.offers()["noise"].laws["fc1"]
    expected = (math.exp(1) - math.exp(-5)) / 6
    assert law.mean.tolist() == pytest.approx([expected] * 4, rel=1e-6)
    assert float(model.low) == -5.0


def test_draws_by_something_else():
    with pytest.raises(ValueError, match="'batch' or 'example'"):
        build(mlp([3, 4, 2]), torch.zeros(2, 3), {"noise_draws": "unit"})


# -- noise by example ------------------------------------------------------------------------------


def problem(kind, draws):
    """Model, guide, x and y with a noise that matters."""
    torch.manual_seed(3)
    if kind == "mlp":
        net, x = mlp([3, 5, 2], "tanh"), 2 * torch.randn(12, 3)
    else:
        net, x = lenet5_caffe("tanh", widths=(2, 3, 4), size=16), torch.randn(6, 1, 16, 16)
    with torch.no_grad():
        for value in net.parameters():
            value.mul_(1.5)
    # One class: what a noise does to one example it does to the others.
    y = torch.zeros(len(x), dtype=torch.long)
    model, guide = build(net, x[:2], {"noise_draws": draws}, prune_inputs=kind == "mlp")
    for name in guide.noises:
        set_noise(guide, name, -0.5, 0.3)
    return model, guide, x, y


def sampled(kind, draws, count):
    """Log-likelihoods and gradients of many draws."""
    model, guide, x, y = problem(kind, draws)
    parameters = [value for value in guide.parameters() if value.requires_grad]
    logs, gradients = [], []
    with own_parameters(model, guide):
        for _ in range(count):
            value = ELBO().estimate(model, guide, x, y).log_likelihood
            parts = torch.autograd.grad(value, parameters)
            logs.append(value.detach())
            gradients.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(logs), torch.stack(gradients)


@pytest.mark.parametrize("kind", ["mlp", "images"])
def test_draws_by_example_are_unbiased_and_vary_less(kind):
    """The likelihood is a sum over examples: equal in expectation, gradients too."""
    batch, batch_gradient = sampled(kind, "batch", 120)
    example, example_gradient = sampled(kind, "example", 120)
    for one, other in ((batch, example), (batch_gradient, example_gradient)):
        error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() <= 5 * error + 1e-5).all()
    assert float(example.var() / batch.var()) < 0.6
    assert float(example_gradient.var(0).sum() / batch_gradient.var(0).sum()) < 0.8


@pytest.mark.parametrize("kind", ["mlp", "images"])
def test_each_example_has_its_own_noise(kind):
    for draws in ("batch", "example"):
        model, guide, x, y = problem(kind, draws)
        # One example again and again: outputs differ just where the noise does.
        x = x[:1].expand(7, *x.shape[1:]).contiguous()
        with torch.no_grad(), own_parameters(model, guide):
            with LocalReparameterisation(len(x)):
                trace = poutine.trace(guide).get_trace(x, y[:7])
            with poutine.replay(trace=trace):
                output = model.run(x, model.rows(), model.input_gate())
        different = (output[1:] - output[0]).abs().amax(1) > 1e-4
        assert different.all() if draws == "example" else not different.any()


def test_a_layer_that_is_shared_sees_one_draw():
    """Two uses of one layer in an example must see the same noise."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.again, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.again(torch.tanh(self.again(x)))))

    x = torch.randn(4, 3)
    model = models.LogNormalNoise(Twice(), x, num_data=9)
    guide = guides.for_model(model, noise_draws="example")
    trace = poutine.trace(guide).get_trace(x)
    marks = {
        name: site["infer"]["by_example"]
        for name, site in trace.nodes.items()
        if name.endswith(".noise")
    }
    assert not any(marks.values())
