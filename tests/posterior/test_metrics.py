"""Scores against scikit-learn, SciPy and cases made by hand."""

import math

import pytest
import torch
from scipy import integrate, stats
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    log_loss,
    root_mean_squared_error,
)

from pyro_sparse.posterior import (
    accuracy,
    calibration_error,
    metrics,
    negative_log_likelihood,
    rmse,
)


def test_against_scikit_learn():
    probabilities = torch.randn(200, 4, dtype=torch.float64).softmax(-1)
    y = torch.randint(4, (200,))
    assert accuracy(probabilities, y) == pytest.approx(
        accuracy_score(y.numpy(), probabilities.argmax(-1).numpy())
    )
    chosen = probabilities[torch.arange(200), y].log().unsqueeze(0)
    assert negative_log_likelihood(chosen) == pytest.approx(
        log_loss(y.numpy(), probabilities.numpy(), labels=range(4))
    )
    mean, target = torch.randn(200, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    assert rmse(mean, target) == pytest.approx(
        root_mean_squared_error(target.numpy(), mean.numpy())
    )


def test_draws_are_averaged_as_densities():
    log_likelihood = torch.tensor([[0.2, 0.5], [0.6, 0.1]]).log()
    expected = -(math.log(0.4) + math.log(0.3)) / 2
    assert negative_log_likelihood(log_likelihood) == pytest.approx(expected, rel=1e-6)
    # One draw that excludes the target does not make the mixture infinite.
    certain = torch.tensor([[0.0], [-math.inf]])
    assert negative_log_likelihood(certain) == pytest.approx(math.log(2))


def test_calibration_error_of_known_cases():
    y = torch.tensor([0, 1, 0, 1])
    right = torch.nn.functional.one_hot(y, 2).double()
    assert calibration_error(right, y) == 0  # certain and right
    assert calibration_error(1 - right, y) == 1  # certain and wrong
    # Three of four right at confidence 3/4.
    calibrated = torch.tensor([[0.75, 0.25]], dtype=torch.float64).expand(4, 2)
    assert calibration_error(calibrated, torch.tensor([0, 0, 0, 1])) == pytest.approx(0)
    assert calibration_error(calibrated, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.5)


def test_calibration_error_weights_its_bins():
    """Ten examples at 0.95 with 9 right, thirty at 0.55 with 30 right."""
    confidence = torch.tensor([0.95] * 10 + [0.55] * 30, dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], -1)
    y = torch.tensor([0] * 9 + [1] + [0] * 30)
    expected = 10 / 40 * abs(0.9 - 0.95) + 30 / 40 * abs(1 - 0.55)
    assert calibration_error(probabilities, y) == pytest.approx(expected)
    # In one bin, errors of opposite sign cancel.
    assert calibration_error(probabilities, y, bins=1) == pytest.approx(abs(39 / 40 - 0.65))


def test_edges_of_the_bins_belong_to_the_lower_one():
    probabilities = torch.tensor([[0.5, 0.5], [0.6, 0.4]], dtype=torch.float64)
    # Bins (0, ½] and (½, 1].
    assert calibration_error(probabilities, torch.tensor([0, 0]), bins=2) == pytest.approx(0.45)


# -- classes -------------------------------------------------------------------------------------


def test_brier_score_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    expected = ((0.3**2 + 0.2**2 + 0.1**2) + (0.1**2 + 0.9**2 + 0.8**2)) / 2
    assert metrics.brier_score(probabilities, y) == pytest.approx(expected)
    # Two classes: twice scikit-learn's, which counts one of them.
    p, label = torch.rand(100, dtype=torch.float64), torch.randint(2, (100,))
    ours = metrics.brier_score(torch.stack([1 - p, p], -1), label)
    assert ours == pytest.approx(2 * brier_score_loss(label.numpy(), p.numpy()))


def test_reliability_curve_by_hand_and_against_the_calibration_error():
    confidence = torch.tensor([0.95] * 10 + [0.55] * 30, dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], -1)
    y = torch.tensor([0] * 9 + [1] + [0] * 24 + [1] * 6)
    curve = metrics.reliability_curve(probabilities, y)
    assert curve.confidence.tolist() == pytest.approx([0.55, 0.95])
    assert curve.accuracy.tolist() == pytest.approx([0.8, 0.9])
    assert curve.examples.tolist() == [30, 10]
    probabilities = torch.randn(300, 4, dtype=torch.float64).mul(2).softmax(-1)
    y = torch.randint(4, (300,))
    curve = metrics.reliability_curve(probabilities, y, bins=10)
    gaps = curve.examples / 300 * (curve.accuracy - curve.confidence).abs()
    assert float(gaps.sum()) == pytest.approx(calibration_error(probabilities, y, bins=10))


def test_entropy_and_mutual_information():
    """Draws that agree know nothing of each other; draws that are sure and differ know all."""
    agree = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]], dtype=torch.float64)
    differ = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    for draws, information in ((agree, 0.0), (differ, math.log(2))):
        assert metrics.predictive_entropy(draws).tolist() == pytest.approx([math.log(2)])
        assert metrics.mutual_information(draws).tolist() == pytest.approx([information])
    draws = torch.randn(6, 20, 3, dtype=torch.float64).softmax(-1)
    total = stats.entropy(draws.mean(0).numpy(), axis=-1)
    within = stats.entropy(draws.numpy(), axis=-1).mean(0)
    assert metrics.predictive_entropy(draws).tolist() == pytest.approx(total.tolist())
    assert metrics.mutual_information(draws).tolist() == pytest.approx((total - within).tolist())


def test_auroc_counts_pairs():
    inside, outside = torch.tensor([0.1, 0.4, 0.35]), torch.tensor([0.8, 0.4])
    # 5 of 6 pairs in order and one tie.
    assert metrics.out_of_distribution_auroc(inside, outside) == pytest.approx(5.5 / 6)
    assert metrics.out_of_distribution_auroc(outside, inside) == pytest.approx(0.5 / 6)
    with pytest.raises(ValueError, match="of both kinds, got 0 and 2"):
        metrics.out_of_distribution_auroc(inside[:0], outside)


# -- mixtures of normals -------------------------------------------------------------------------


@pytest.fixture
def mixture():
    """Five components for each of four targets, with scales of very different size."""
    mean = torch.randn(5, 4, dtype=torch.float64) * 2
    scale = torch.rand(5, 4, dtype=torch.float64) * 2 + 0.05
    return mean, scale, torch.tensor([0.3, -2.0, 5.0, 0.0], dtype=torch.float64)


def test_crps_against_quadrature(mixture):
    mean, scale, y = mixture
    expected = []
    for i in range(4):

        def integrand(t, i=i):
            below = stats.norm.cdf(t, mean[:, i].numpy(), scale[:, i].numpy()).mean()
            return (below - (t >= float(y[i]))) ** 2

        total, _ = integrate.quad(integrand, -40, 40, points=[float(y[i])], limit=400)
        expected.append(total)
    assert metrics.crps(mean, scale, y) == pytest.approx(sum(expected) / 4, rel=1e-7)


def test_crps_of_one_normal():
    """σ [z (2Φ(z) − 1) + 2φ(z) − 1/√π] of Gneiting and Raftery; a point mass is off by |y − m|."""
    y, scale = 1.7, 0.6
    z = y / scale
    expected = scale * (
        z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi)
    )
    one = (torch.zeros(1, 1), torch.full((1, 1), scale), torch.tensor([y]))
    assert metrics.crps(*one) == pytest.approx(expected, rel=1e-6)
    narrow = metrics.crps(torch.zeros(1, 1), torch.full((1, 1), 1e-9), torch.tensor([y]))
    assert narrow == pytest.approx(y, rel=1e-6)


def test_pit_and_quantiles_against_scipy(mixture):
    mean, scale, y = mixture
    pit = metrics.probability_integral_transform(mean, scale, y)
    expected = stats.norm.cdf(y.numpy(), mean.numpy(), scale.numpy()).mean(0)
    assert pit.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    for probability in (0.025, 0.3, 0.975):
        quantile = metrics.mixture_quantile(mean, scale, probability)
        back = metrics.probability_integral_transform(mean, scale, quantile)
        assert back.tolist() == pytest.approx([probability] * 4, rel=1e-10)
    one = metrics.mixture_quantile(mean[:1], scale[:1], 0.9)
    assert one.tolist() == pytest.approx(
        stats.norm.ppf(0.9, mean[0].numpy(), scale[0].numpy()).tolist()
    )


def test_coverage_is_that_of_the_interval_between_quantiles():
    mean = torch.randn(7, 200, dtype=torch.float64)
    scale = torch.rand(7, 1, dtype=torch.float64) + 0.2
    y = torch.randn(200, dtype=torch.float64) * 2
    pit = metrics.probability_integral_transform(mean, scale, y)
    for level in (0.5, 0.9):
        low = metrics.mixture_quantile(mean, scale, (1 - level) / 2)
        high = metrics.mixture_quantile(mean, scale, (1 + level) / 2)
        inside = float(((low <= y) & (y <= high)).double().mean())
        assert metrics.interval_coverage(pit, level) == inside
        assert 0.1 < inside < level


def test_a_calibrated_mixture_covers_and_a_narrow_one_does_not():
    mean, scale = torch.randn(3, 4000, dtype=torch.float64), torch.rand(3, 1).double() + 0.5
    component = torch.randint(3, (4000,))
    chosen, noise = mean[component, torch.arange(4000)], scale[component, 0]
    y = chosen + noise * torch.randn(4000, dtype=torch.float64)
    pit = metrics.probability_integral_transform(mean, scale, y)
    # Four standard errors of a share among 4000.
    assert metrics.interval_coverage(pit, 0.95) == pytest.approx(0.95, abs=0.014)
    assert stats.kstest(pit.numpy(), "uniform").pvalue > 1e-3
    narrow = metrics.probability_integral_transform(mean, scale / 2, y)
    assert metrics.interval_coverage(narrow, 0.95) < 0.9
    # ... and the score says so: CRPS is proper.
    assert metrics.crps(mean, scale, y) < metrics.crps(mean, scale / 2, y)
    assert metrics.crps(mean, scale, y) < metrics.crps(mean, scale * 2, y)


def test_wrong_shapes_and_levels(mixture):
    mean, scale, y = mixture
    with pytest.raises(ValueError, match=r"means \(draws, N\).* got \(5, 4\), \(5, 4\) and \(3,\)"):
        metrics.crps(mean, scale, y[:3])
    with pytest.raises(ValueError, match=r"level in \(0, 1\), got 95"):
        metrics.interval_coverage(y, 95)
    with pytest.raises(ValueError, match=r"probability in \(0, 1\), got 1"):
        metrics.mixture_quantile(mean, scale, 1)


@pytest.mark.parametrize("shape", [(6, 1), (1,), (5,), (6, 6)])
def test_targets_are_never_broadcast(shape):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(6, 3, generator=generator).softmax(-1)
    labels = torch.zeros(shape, dtype=torch.long)
    for score in (
        metrics.accuracy,
        metrics.calibration_error,
        metrics.brier_score,
        metrics.reliability_curve,
    ):
        with pytest.raises(ValueError, match=r"expected targets of shape \(6,\)"):
            score(probabilities, labels)
    with pytest.raises(ValueError, match=r"expected targets of shape \(6,\)"):
        metrics.rmse(torch.zeros(6), torch.zeros(shape))
