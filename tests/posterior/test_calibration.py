"""Calibration of the ensemble beside the compact network, by way of the posterior."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.nets import mlp
from pyro_sparse.posterior import Posterior, metrics, plots
from pyro_sparse.posterior.calibration import calibrate


def posterior_of(likelihood, outputs):
    x = torch.randn(40, 3)
    model = models.SpikeSlabGaussian(
        mlp([3, 5, outputs]), x[:2], likelihood=likelihood, num_data=40
    )
    return Posterior(model, guides.for_model(model, initial_scale=0.3)), x


def test_of_classes_by_hand():
    posterior, x = posterior_of(likelihoods.Categorical(), 2)
    y = torch.randint(2, (40,))
    torch.manual_seed(3)
    draws = posterior.predict(x, 6).double()
    torch.manual_seed(3)
    both = posterior.calibration(x, y, num_samples=6)
    assert both["ensemble"].scores == pytest.approx(
        {
            "brier": metrics.brier_score(draws.mean(0), y),
            "ece": metrics.calibration_error(draws.mean(0), y),
            "entropy": float(metrics.predictive_entropy(draws).mean()),
            "mutual_information": float(metrics.mutual_information(draws).mean()),
        }
    )
    one = posterior.masked(x).softmax(-1).double()
    assert both["compact"].scores["brier"] == pytest.approx(metrics.brier_score(one, y))
    # One network does not disagree with itself; draws do.
    assert both["compact"].scores["mutual_information"] == pytest.approx(0, abs=1e-12)
    assert both["ensemble"].scores["mutual_information"] > 1e-4
    assert int(both["ensemble"].reliability.examples.sum()) == 40
    told = json.loads(json.dumps(both["ensemble"].to_dict()))
    assert told["reliability"]["examples"] == both["ensemble"].reliability.examples.tolist()


@pytest.mark.parametrize("noise_scale", [None, 0.4])
def test_of_numbers_by_hand(noise_scale):
    posterior, x = posterior_of(likelihoods.Normal(noise_scale), 1)
    y = torch.randn(40)
    torch.manual_seed(3)
    means, scales = [], []
    for output, latents in posterior.draws(x, 6):
        means.append(output.squeeze(-1).double())
        scales.append(noise_scale or float(latents["noise_precision"]) ** -0.5)
    torch.manual_seed(3)
    both = posterior.calibration(x, y, num_samples=6, target_scale=10.0)
    mean = torch.stack(means)
    pit = stats.norm.cdf(y.numpy(), mean.numpy(), torch.tensor(scales)[:, None].numpy()).mean(0)
    ensemble = both["ensemble"]
    assert ensemble.pit.tolist() == pytest.approx(pit.tolist(), rel=1e-5)
    for level in (50, 80, 90, 95):
        inside = abs(pit - 0.5) <= level / 200
        assert ensemble.scores[f"coverage_{level}"] == pytest.approx(inside.mean())
    scale = torch.tensor(scales, dtype=torch.float64)[:, None]
    assert ensemble.scores["crps"] == pytest.approx(10 * metrics.crps(mean, scale, y), rel=1e-5)
    told = ensemble.to_dict()
    assert sum(told["pit_counts"]) == 40
    assert told["pit_counts"][0] == int((pit < 0.05).sum())
    # One normal law: the interval is 2 · 1.96 standard deviations wide.
    latents = posterior.mean_latents()
    deviation = noise_scale or float(latents["noise_precision"]) ** -0.5
    assert both["compact"].scores["width_95"] == pytest.approx(
        10 * 2 * stats.norm.ppf(0.975) * deviation, rel=1e-5
    )


def test_more_noise_makes_wider_intervals_that_cover_more():
    x, y = torch.zeros(300, 1), torch.randn(300)
    covered = []
    for noise in (0.5, 1.0, 2.0):
        one = calibrate(likelihoods.Normal(noise), [(x, {})], y)
        covered.append(one.scores["coverage_95"])
        assert one.scores["width_95"] == pytest.approx(2 * 1.959964 * noise, rel=1e-5)
    assert covered[0] < 0.8 < 0.92 < covered[1] < 0.98 < covered[2]


def test_counts_and_no_draws_are_refused():
    posterior, x = posterior_of(likelihoods.Poisson(), 1)
    with pytest.raises(ValueError, match="got the likelihood Poisson"):
        posterior.calibration(x, torch.ones(40), num_samples=2)
    with pytest.raises(ValueError, match="likelihood of classes, got Poisson"):
        posterior.out_of_distribution(x, x)
    for likelihood in (likelihoods.Normal(), likelihoods.Categorical()):
        with pytest.raises(ValueError, match="at least one draw, got none"):
            calibrate(likelihood, [], torch.ones(40))


def test_out_of_distribution():
    """Far away, draws of the weights disagree more than near the data."""
    posterior, x = posterior_of(likelihoods.Categorical(), 2)
    scores = posterior.out_of_distribution(0.1 * x, 20 * x, num_samples=20)
    assert set(scores) == {"auroc_entropy", "auroc_mutual_information"}
    assert scores["auroc_mutual_information"] > 0.7
    torch.manual_seed(0)
    same = posterior.out_of_distribution(x, x, num_samples=20)
    # Of the same scores but for rounding, which depends on where in memory a batch lies.
    half = {"auroc_entropy": 0.5, "auroc_mutual_information": 0.5}
    assert same == pytest.approx(half, abs=2e-3)


def test_reliability_diagram():
    ax = Figure().subplots()
    curve = metrics.ReliabilityCurve(
        torch.tensor([0.55, 0.9]), torch.tensor([0.6, 0.7]), torch.tensor([30, 10])
    )
    assert plots.reliability_diagram({"ensemble": curve, "compact": curve}, ax) is ax
    points = ax.collections[0].get_offsets()
    assert points[:, 0].tolist() == pytest.approx([0.55, 0.9])
    assert points[:, 1].tolist() == pytest.approx([0.6, 0.7])
    small, large = sorted(ax.collections[0].get_sizes())
    assert large > 2 * small
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ensemble", "compact"]


def test_pit_histogram():
    ax = Figure().subplots()
    values = torch.tensor([0.01, 0.02, 0.03, 0.99])
    assert plots.pit_histogram({"ensemble": values}, ax, bins=2) is ax
    # Three of four in the lower half: densities 1.5 and 0.5.
    outline = ax.patches[0].get_xy()
    assert {round(float(height), 6) for height in outline[:, 1]} == {0.0, 1.5, 0.5}
    assert ax.get_ylim()[1] > 1.5
