"""Each model's log joint at a given sample is the paper's, computed by hand in float64."""

import math

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats

from pyro_sparse import likelihoods, models
from pyro_sparse.nets import mlp

# (units, row length) of the hidden layer and of the output layer of mlp([3, 4, 2])
HIDDEN, OUT = (4, 4), (2, 5)
INCLUDED = torch.tensor([True, False, True, False])
NUM_DATA, BATCH = 60, 6


@pytest.fixture
def data():
    return torch.randn(BATCH, 3, dtype=torch.float64), torch.randint(2, (BATCH,))


@pytest.fixture
def rows():
    hidden = torch.randn(HIDDEN, dtype=torch.float64) * INCLUDED.unsqueeze(-1)
    return {"fc1.rows": hidden, "out.rows": torch.randn(OUT, dtype=torch.float64)}


def make(cls, **options):
    net = mlp([3, 4, 2], "tanh").double()
    example = torch.zeros(2, 3, dtype=torch.float64)
    return cls(net, example, num_data=NUM_DATA, **options).double()


def log_joint(model, sample, data):
    trace = poutine.trace(poutine.condition(model, data=sample)).get_trace(*data)
    return trace.log_prob_sum().item()


def log_likelihood(hidden, out, data):
    """NUM_DATA / BATCH times that of the batch, for a net with one hidden tanh layer."""
    x, y = (value.numpy() for value in data)
    logits = np.tanh(x @ hidden[:, :3].T + hidden[:, 3]) @ out[:, :4].T + out[:, 4]
    chosen = logits[np.arange(len(y)), y]
    return NUM_DATA / BATCH * (chosen - np.log(np.exp(logits).sum(-1))).sum()


def log_rows(rows, inclusion, slab_scale, output_scale):
    """Spike-and-slab on the hidden layer, Gaussian on the output layer."""
    hidden, out = rows["fc1.rows"].numpy(), rows["out.rows"].numpy()
    included = INCLUDED.numpy()
    total = stats.norm.logpdf(out, scale=output_scale).sum()
    total += included.sum() * math.log(inclusion) + (~included).sum() * math.log1p(-inclusion)
    return total + stats.norm.logpdf(hidden[included], scale=slab_scale).sum()


@pytest.mark.parametrize("inclusion", [0.3, 1e-6])
def test_spike_slab_gaussian(rows, data, inclusion):
    model = make(
        models.SpikeSlabGaussian, inclusion_probability=inclusion, slab_scale=0.7, output_scale=1.3
    )
    expected = log_rows(rows, inclusion, 0.7, 1.3)
    expected += log_likelihood(rows["fc1.rows"].numpy(), rows["out.rows"].numpy(), data)
    assert log_joint(model, rows, data) == pytest.approx(expected, rel=1e-6)


def test_spike_slab_group_lasso(rows, data):
    model = make(
        models.SpikeSlabGroupLasso,
        inclusion_probability=0.3,
        slab_scale=0.7,
        output_scale=1.3,
        varsigma2_shape=3.0,
        varsigma2_rate=1.5,
    )
    tau2 = torch.rand(4, dtype=torch.float64) + 0.2
    varsigma2 = torch.tensor(2.3, dtype=torch.float64)
    sample = rows | {"fc1.tau2": tau2, "varsigma2": varsigma2}
    expected = log_rows(rows, 0.3, 0.7, 1.3)
    expected += stats.gamma.logpdf(2.3, 3.0, scale=1 / 1.5)
    # rows of m = 4 numbers: Gamma((m + 1) / 2, rate ς² / 2)
    expected += stats.gamma.logpdf(tau2.numpy(), 5 / 2, scale=2 / 2.3).sum()
    effective = (rows["fc1.rows"] * tau2.sqrt().unsqueeze(-1)).numpy()
    expected += log_likelihood(effective, rows["out.rows"].numpy(), data)
    assert log_joint(model, sample, data) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("regularisation", [1.0, 0.4, math.inf])
@pytest.mark.parametrize(("global_scale", "local_scale"), [(1.0, 1.0), (0.2, 3.0)])
def test_spike_slab_group_horseshoe(rows, data, regularisation, global_scale, local_scale):
    model = make(
        models.SpikeSlabGroupHorseshoe,
        inclusion_probability=0.3,
        slab_scale=0.7,
        output_scale=1.3,
        global_scale=global_scale,
        local_scale=local_scale,
        regularisation=regularisation,
    )
    local = torch.rand(4, 2, dtype=torch.float64) + 0.2
    overall = torch.tensor([0.6, 1.9], dtype=torch.float64)
    sample = rows | {"fc1.local_scale": local, "global_scale": overall}
    expected = log_rows(rows, 0.3, 0.7, 1.3)
    for factors, scale in ((overall.numpy(), global_scale), (local.numpy(), local_scale)):
        expected += stats.gamma.logpdf(factors[..., 0], 0.5, scale=scale**2).sum()
        expected += stats.invgamma.logpdf(factors[..., 1], 0.5).sum()
    rho = np.sqrt(overall.prod().numpy() * local.prod(-1).numpy())
    if math.isfinite(regularisation):
        rho = regularisation * rho / np.sqrt(regularisation**2 + rho**2)
    effective = rows["fc1.rows"].numpy() * rho[:, None]
    expected += log_likelihood(effective, rows["out.rows"].numpy(), data)
    assert log_joint(model, sample, data) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("regularisation", [0.4, math.inf])
def test_group_horseshoe(data, regularisation):
    model = make(
        models.GroupHorseshoe,
        output_scale=1.3,
        global_scale=0.2,
        local_scale=3.0,
        regularisation=regularisation,
    )
    hidden = torch.randn(HIDDEN, dtype=torch.float64)
    out = torch.randn(OUT, dtype=torch.float64)
    local = torch.rand(4, 2, dtype=torch.float64) + 0.2
    layer = torch.tensor([0.6, 1.9], dtype=torch.float64)
    sample = {
        "fc1.rows": hidden,
        "out.rows": out,
        "fc1.local_scale": local,
        "fc1.global_scale": layer,
    }
    expected = stats.norm.logpdf(hidden.numpy()).sum()
    expected += stats.norm.logpdf(out.numpy(), scale=1.3).sum()
    for factors, scale in ((layer.numpy(), 0.2), (local.numpy(), 3.0)):
        expected += stats.gamma.logpdf(factors[..., 0], 0.5, scale=scale**2).sum()
        expected += stats.invgamma.logpdf(factors[..., 1], 0.5).sum()
    rho = np.sqrt(layer.prod().numpy() * local.prod(-1).numpy())
    if math.isfinite(regularisation):
        rho = regularisation * rho / np.sqrt(regularisation**2 + rho**2)
    expected += log_likelihood(hidden.numpy() * rho[:, None], out.numpy(), data)
    assert log_joint(model, sample, data) == pytest.approx(expected, rel=1e-6)


def test_group_normal_jeffreys(data):
    model = make(models.GroupNormalJeffreys, output_scale=1.3)
    hidden = torch.randn(HIDDEN, dtype=torch.float64)
    out = torch.randn(OUT, dtype=torch.float64)
    z = torch.tensor([0.7, -1.2, 2.0, 1e-3], dtype=torch.float64)
    sample = {"fc1.rows": hidden, "out.rows": out, "fc1.scale": z}
    constant = 0.5 * (np.euler_gamma + math.log(2) + math.log(2 * math.pi * math.e))
    expected = stats.norm.logpdf(hidden.numpy()).sum() - np.log(np.abs(z.numpy())).sum()
    expected += stats.norm.logpdf(out.numpy(), scale=1.3).sum() - len(z) * constant
    effective = hidden.numpy() * z.numpy()[:, None]
    expected += log_likelihood(effective, out.numpy(), data)
    assert log_joint(model, sample, data) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prior_scale", [None, 0.8])
def test_deterministic(rows, data, prior_scale):
    model = make(models.Deterministic, prior_scale=prior_scale)
    expected = log_likelihood(rows["fc1.rows"].numpy(), rows["out.rows"].numpy(), data)
    if prior_scale is not None:
        expected += sum(
            stats.norm.logpdf(r.numpy(), scale=prior_scale).sum() for r in rows.values()
        )
    assert log_joint(model, rows, data) == pytest.approx(expected, rel=1e-6)


# -- marginal laws -------------------------------------------------------------------------------


def test_group_lasso_slab_is_the_multivariate_laplace():
    """τ² integrated out: (ς/σ0)^m Γ(m/2) / (2 π^{m/2} Γ(m)) exp(−ς ‖w‖ / σ0)."""
    net, example = mlp([2, 1, 1]).double(), torch.zeros(2, 2, dtype=torch.float64)
    likelihood = likelihoods.Normal(noise_scale=1.0)
    model = models.SpikeSlabGroupLasso(
        net, example, likelihood=likelihood, num_data=2, inclusion_probability=0.3, slab_scale=0.7
    ).double()
    varsigma2, m = 2.3, 3
    weights = torch.tensor([[0.4, -0.9, 0.2]], dtype=torch.float64)

    def density(log_tau2):
        """p(w | τ²) p(τ²) dτ² / d log τ², with p(w | τ²) from the non-centred rows."""
        tau2 = torch.tensor([math.exp(log_tau2)], dtype=torch.float64)
        sample = {
            "varsigma2": torch.tensor(varsigma2, dtype=torch.float64),
            "fc1.tau2": tau2,
            "fc1.rows": weights / tau2.sqrt(),
        }
        trace = poutine.trace(poutine.condition(model, data=sample)).get_trace(example)
        trace.compute_log_prob()
        log = sum(trace.nodes[s]["log_prob_sum"].item() for s in ("fc1.tau2", "fc1.rows"))
        return math.exp(log - math.log(0.3) - m / 2 * log_tau2 + log_tau2)

    # The integrand vanishes at both ends: the trapezoidal rule converges exponentially.
    grid, step = np.linspace(-10, 6, 161, retstep=True)
    marginal = step * sum(map(density, grid))
    rate = math.sqrt(varsigma2) / 0.7
    expected = rate**m * math.gamma(m / 2) / (2 * math.pi ** (m / 2) * math.gamma(m))
    expected *= math.exp(-rate * weights.norm().item())
    assert marginal == pytest.approx(expected, rel=1e-6)


def test_horseshoe_scales_are_half_cauchy():
    model = models.SpikeSlabGroupHorseshoe(
        mlp([2, 3000, 2]), torch.zeros(2, 2), num_data=9, global_scale=0.2, local_scale=3.0
    ).double()
    trace = poutine.trace(model.rows).get_trace()
    local = trace.nodes["fc1.local_scale"]["value"].prod(-1).sqrt()
    assert stats.kstest(local.numpy(), stats.halfcauchy(scale=3.0).cdf).pvalue > 1e-3
    law = trace.nodes["global_scale"]["fn"]
    overall = law.sample((3000,)).prod(-1).sqrt()
    assert stats.kstest(overall.numpy(), stats.halfcauchy(scale=0.2).cdf).pvalue > 1e-3


def test_regularisation_bounds_the_scale():
    model = models.SpikeSlabGroupHorseshoe(
        mlp([2, 3, 2]), torch.zeros(2, 2), num_data=9, regularisation=0.5
    )
    log_scale = torch.tensor([math.log(1e-6), math.log(0.5), 20.0, 500.0], requires_grad=True)
    scale = model.regularised(log_scale)
    assert scale.tolist() == pytest.approx([1e-6, 0.5 / math.sqrt(2), 0.5, 0.5], rel=1e-5)
    scale.sum().backward()
    assert log_scale.grad.tolist() == pytest.approx([1e-6, 0.25 / math.sqrt(2), 0, 0], abs=1e-6)
