"""Contraction against the prior, around a reference, and in theory."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.models import layerwise_inclusion_logits
from pyro_sparse.nets import mlp
from pyro_sparse.posterior import (
    Curve,
    Posterior,
    contraction_curve,
    plots,
    theoretical_rate,
)
from pyro_sparse.posterior.contraction import distances, fitted_rate
from pyro_sparse.posterior.importance import NotOfferedError


def network(cls=models.SpikeSlabGaussian, guide_options=None, likelihood=None, **options):
    model = cls(
        mlp([3, 6, 1]),
        torch.randn(4, 3),
        num_data=50,
        likelihood=likelihood or likelihoods.Normal(),
        **options,
    )
    return Posterior(model, guides.for_model(model, **(guide_options or {})))


# -- against the prior -----------------------------------------------------------------------------


def test_contraction_in_closed_form():
    posterior = network(
        inclusion_probability=0.02, slab_scale=2.0, prune_inputs=True,
        guide_options={"initial_scale": 0.1, "initial_inclusion": 0.7, "variance": "full"},
    )  # fmt: skip
    result = posterior.contraction()
    assert [group.group for group in result.groups] == ["fc1", "out", "input", "noise_precision"]
    fc1 = result["fc1"]
    mean = posterior.guide.mean_rows()["fc1"].detach().double()
    # Given inclusion: 0.1² of σ0² = 4, which is by 6 × 1000 draws (√(2/6000) = 1.8 %).
    assert torch.allclose(fc1.posterior_variance, torch.tensor(0.01).double(), rtol=1e-5)
    assert torch.allclose(fc1.prior_variance, torch.tensor(4.0).double(), rtol=0.1)
    assert torch.allclose(fc1.contraction, 1 - 0.01 / fc1.prior_variance, rtol=1e-5)
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    assert fc1.probability.tolist() == pytest.approx([0.7] * 6)
    assert fc1.entropy.tolist() == pytest.approx([entropy] * 6)
    # z is of inclusion times weight.
    variance = 0.7 * 0.01 + 0.7 * 0.3 * mean.square()
    assert torch.allclose(fc1.z, 0.7 * mean / variance.sqrt(), atol=0.1)
    gate = result["input"]  # 1 given that it is in; whether it is, the entropy says
    assert gate.posterior_variance.tolist() == [0.0] * 3
    assert gate.total == 1
    assert gate.entropy.tolist() == pytest.approx([entropy] * 3)
    assert gate.z.tolist() == pytest.approx([(0.7 - 0.5) / math.sqrt(0.21)] * 3)
    assert result["out"].entropy.tolist() == [0.0]
    # The prior Gamma(1, 1) has variance 1, by 1000 draws (kurtosis 9).
    assert float(result["noise_precision"].prior_variance) == pytest.approx(1, abs=0.5)
    line = str(result).splitlines()[1]
    assert line.split()[:2] == ["fc1", "24"]
    assert line.endswith(f"4.2 of 6     {6 * entropy:.2f}")
    with pytest.raises(KeyError, match="no group 'fc9'; there are fc1"):
        result["fc9"]


def test_units_that_are_known_exactly_have_contracted():
    """A small prior inclusion probability does not make them less certain than the prior."""
    posterior = network(inclusion_probability=1 / 400, guide_options={"variance": "full"})
    rows = posterior.guide.row_families["fc1"]
    with torch.no_grad():
        rows.loc.fill_(1.0)
        rows.log_scale.fill_(math.log(0.01))
        rows.inclusion_logits[:] = torch.tensor([99.0, 99, 99, 1, 1 / 9, 1e-6]).log()
    fc1 = posterior.contraction(num_samples=500)["fc1"]
    assert fc1.total == pytest.approx(1 - 1e-4, abs=2e-5)
    assert fc1.entropy[3] == pytest.approx(math.log(2))
    assert fc1.entropy[0] == pytest.approx(0.056, abs=1e-3)
    with torch.no_grad():  # of a unit that is out, nothing need be known
        rows.log_scale[5] = math.log(3.0)
    assert posterior.contraction(num_samples=500)["fc1"].total > 0.999


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (models.SpikeSlabGroupLasso, {"initial_inclusion": 0.6}),
        (models.SpikeSlabGroupHorseshoe, {"initial_inclusion": 0.6}),
        # Its inclusions do not multiply the rows.
        (models.TurboMarkov, {}),
    ],
)
def test_closed_form_agrees_with_draws(cls, options, monkeypatch):
    posterior = network(cls, guide_options={"initial_scale": 0.2, **options})
    closed = posterior.contraction(num_samples=20)["fc1"].posterior_variance
    monkeypatch.setattr(posterior, "row_variances", dict)
    drawn = posterior.contraction(num_samples=1200)["fc1"].posterior_variance
    assert torch.allclose(drawn.sum(), closed.sum(), rtol=0.15)
    assert torch.allclose(drawn, closed, rtol=0.6)


def test_contraction_of_a_guide_that_is_the_prior():
    posterior = network(
        inclusion_probability=0.5,
        guide_options={"initial_scale": 1.0, "initial_inclusion": 0.5, "variance": "full"},
    )
    with torch.no_grad():
        posterior.guide.row_families["fc1"].loc.zero_()
    fc1 = posterior.contraction(num_samples=2000)["fc1"]
    assert fc1.total == pytest.approx(0, abs=0.06)
    assert fc1.rms_z < 0.1


def test_z_scores_against_a_truth():
    posterior = network(guide_options={"initial_scale": 0.1, "variance": "full"})
    out = posterior.guide.mean_rows()["out"].detach()
    z = posterior.contraction({"out": out - 0.3}, num_samples=10)["out"].z
    assert z.flatten().tolist() == pytest.approx([3.0] * 7, rel=1e-4)
    with pytest.raises(ValueError, match=r"truth of shape \(1, 7\) for 'out', got \(7,\)"):
        posterior.contraction({"out": out[0]}, num_samples=10)


def test_contraction_after_pruning():
    posterior = network()
    keep = torch.arange(6) < 2
    posterior.prune(lambda p: {"fc1": keep})
    fc1 = posterior.contraction(num_samples=10)["fc1"]
    assert bool((fc1.posterior_variance[~keep] == 0).all())
    assert bool((fc1.z[~keep] == 0).all())


def test_contraction_refuses():
    with pytest.raises(NotOfferedError, match="the prior of Deterministic is improper"):
        network(models.Deterministic).contraction()
    with pytest.raises(ValueError, match="at least two draws"):
        network().contraction(num_samples=1)


# -- around a reference ----------------------------------------------------------------------------


def test_distances_by_hand():
    predictions = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert distances(predictions, torch.tensor([1.0, 0.0]), "L2").tolist() == pytest.approx(
        [math.sqrt(2), math.sqrt(0.5)]
    )
    classes = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    known = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert distances(classes, known, "Hellinger").tolist() == pytest.approx([math.sqrt(0.5)])
    with pytest.raises(ValueError, match=r"reference of shape \(2,\)"):
        distances(predictions, torch.zeros(3), "L2")
    with pytest.raises(ValueError, match="'L2' or 'Hellinger', got 'L1'"):
        distances(predictions, torch.zeros(2), "L1")


def test_radius_of_regression_and_classification():
    x = torch.randn(40, 3)
    posterior = network(guide_options={"initial_scale": 0.1, "initial_inclusion": 0.999999})
    around_mean = posterior.radius(x)
    assert around_mean.kind == "L2"
    assert around_mean.distances.shape == (200,)
    assert 0 < around_mean.quantile(0.5) < around_mean.quantile()
    mean = posterior.predict(x, 500).mean(0)
    far = posterior.radius(x, mean + 3.0)
    assert far.quantile(0.5) == pytest.approx(3.0, rel=0.2)
    assert "95 %" in str(far)
    binary = network(likelihood=likelihoods.Bernoulli()).radius(x)
    assert binary.kind == "Hellinger"
    assert binary.quantile(1.0) <= 1
    # A Bernoulli's reference is the probability of 1.
    sure = network(likelihood=likelihoods.Bernoulli()).radius(x, torch.ones(40))
    assert sure.quantile(0.05) > 0.2


def linear_posterior(x, y):
    """The exact posterior of a linear regression with orthogonal inputs and noise 1/2."""
    n, features = x.shape
    model = models.ReducibleGaussian(
        nn.Sequential(nn.Linear(features, 1, bias=False)), x[:2],
        likelihood=likelihoods.Normal(0.5), num_data=n,
    )  # fmt: skip
    guide = guides.for_model(model, last_layer="joint")
    precision = x.T @ x / 0.25 + torch.eye(features)
    covariance = torch.linalg.inv(precision)
    factor = torch.linalg.cholesky(covariance)
    family = next(iter(guide.row_families.values()))
    with torch.no_grad():
        family.loc.copy_((covariance @ x.T @ y / 0.25).unsqueeze(0))
        family.log_diagonal.copy_(factor.diagonal().log())
        family.below.copy_(factor.tril(-1))
    return Posterior(model, guide)


@pytest.mark.parametrize("truth", [True, False])
def test_contraction_curve_of_a_parametric_model(truth):
    """An exact posterior of four numbers contracts like n^(−1/2)."""
    x, beta = torch.randn(3200, 4), torch.tensor([1.0, -1.0, 0.5, 0.0])
    y = x @ beta + 0.5 * torch.randn(3200)
    inputs = torch.randn(500, 4)
    curve = contraction_curve(
        linear_posterior, x, y, [50, 200, 800, 3200], inputs,
        inputs @ beta if truth else None, repeats=8,
    )  # fmt: skip
    assert curve.radii.shape == (8, 4)
    assert curve.low < curve.slope < curve.high
    # Standard error about 0.04 around the truth, far less around the mean.
    assert curve.slope == pytest.approx(-0.5, abs=0.2 if truth else 0.05)
    if not truth:
        # √(χ²₄'s 95 % quantile / n) times the noise.
        assert float(curve.mean[-1]) == pytest.approx(0.5 * math.sqrt(9.49 / 3200), rel=0.1)
    assert -0.5 < curve.theory_slope < -0.3
    assert float(curve.scaled_theory.log().mean()) == pytest.approx(float(curve.mean.log().mean()))
    lines = str(curve).splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("rate n^-0.")


def test_fitted_rate():
    sizes = [10, 100, 1000]
    exact = torch.tensor([[n**-0.4 for n in sizes], [3 * n**-0.4 for n in sizes]])
    slope, low, high = fitted_rate(sizes, exact)
    assert slope == pytest.approx(-0.4, abs=1e-5)
    assert high - low < 1e-4
    assert fitted_rate(sizes[:2], exact[:1, :2])[1:] == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="positive radii"):
        fitted_rate(sizes, torch.zeros(1, 3))
    # Coverage of the interval: 95 % of 400, give or take five standard errors.
    x = torch.tensor(sizes, dtype=torch.float64).log()
    covered = 0
    for _ in range(400):
        own = torch.randn(3, 1).double() - 0.5 * x + 0.1 * torch.randn(3, 3).double()
        _, low, high = fitted_rate(sizes, own.exp())
        covered += low < -0.5 < high
    assert covered / 400 > 0.95 - 5 * 0.011


def test_contraction_curve_refuses():
    x, y = torch.randn(20, 4), torch.randn(20)
    for sizes in ([10, 5], [5, 30], [], [5, 5]):
        with pytest.raises(ValueError, match="increasing sizes from 1 to 20"):
            contraction_curve(linear_posterior, x, y, sizes, x)
    with pytest.raises(ValueError, match="two or more sizes"):
        contraction_curve(linear_posterior, x, y, [5], x)


def test_plot_of_a_curve():
    radii = torch.tensor([[0.4, 0.2, 0.1], [0.44, 0.22, 0.11]], dtype=torch.float64)
    curve = Curve((100, 400, 1600), radii, *fitted_rate((100, 400, 1600), radii), "L2", (9, 5, 3))
    ax = Figure().subplots()
    assert plots.contraction_curve(curve, ax) is ax
    assert len(ax.lines) == 4
    assert ax.lines[2].get_ydata().tolist() == pytest.approx(curve.mean.tolist())
    assert ax.lines[3].get_linestyle() == "--"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "n^{-0.50}" in labels[0]
    assert "theory" in labels[1]
    assert ax.get_xscale() == ax.get_yscale() == "log"


# -- in theory -------------------------------------------------------------------------------------


def test_theoretical_rate_by_hand():
    posterior = network()
    given = theoretical_rate(
        posterior, 1000, active={"fc1": 2, "out": 1}, bounds={"fc1": 3.0, "out": 2.0}
    )
    log, n = math.log, 1000
    u = [
        4 * (log(n) + log(2) + log(4) + log(6)),
        4 * (log(n) + log(2) + log(7) + log(1)),
    ]
    theta = [
        9 / 4 + log(7) + 1 + log(6) + log(4) + log(n) + log(sum(u)),
        4 / 7 + log(4) + 1 + log(1) + log(7) + log(n) + log(sum(u)),
    ]
    r = 2 * 4 * theta[0] / n + 1 * 7 * theta[1] / n
    assert given == pytest.approx(math.sqrt(r * sum(u)))
    more = theoretical_rate(
        posterior, 1000, active={"fc1": 2, "out": 1}, bounds={"fc1": 3.0, "out": 2.0},
        approximation=0.1,
    )  # fmt: skip
    assert more**2 - given**2 == pytest.approx(0.1 * sum(u))


def test_theoretical_rate_of_a_posterior():
    posterior = network()
    full = theoretical_rate(posterior)
    assert theoretical_rate(posterior, 5000) < full
    with torch.no_grad():
        posterior.guide.inclusion_logits()["fc1"][2:].fill_(-20)
    fewer = theoretical_rate(posterior)
    assert fewer < full
    posterior.prune(lambda p: {"fc1": torch.arange(6) < 1})
    assert theoretical_rate(posterior) < fewer
    with pytest.raises(ValueError, match="between 0 and 6 active units for 'fc1'"):
        theoretical_rate(posterior, active={"fc1": 7})
    with pytest.raises(ValueError, match="num_data ≥ 1"):
        theoretical_rate(posterior, 0)


def test_the_layerwise_prior_did_not_move():
    # 784-400-400-10 and n = 60 000, as the authors' code gives it.
    logits = torch.tensor(layerwise_inclusion_logits([784, 400, 400], [400, 400, 10], 60_000))
    assert logits.double().sigmoid()[:2].tolist() == pytest.approx([0.0015411, 0.0023438], rel=1e-4)
