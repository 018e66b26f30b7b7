"""Changes of evidence against quadrature, their limits, and groups."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import MultivariateNormal

from pyro_sparse.distributions import TiedNormal, TruncatedLogNormal
from pyro_sparse.posterior.reduction import (
    delta_evidence,
    delta_evidence_joint,
    delta_evidence_noise,
)

# -- Gaussian weights ------------------------------------------------------------------------------


def by_quadrature(loc, variance, prior_variance, reduced_variance):
    """log E_q[p~/p] of one Gaussian weight, in extended precision.

    The integrand q p~ / p is Gaussian, too: on even points the trapezoidal rule is exact.
    """
    parts = [
        (np.longdouble(mean), np.longdouble(v), sign)
        for mean, v, sign in ((loc, variance, 1), (0, reduced_variance, 1), (0, prior_variance, -1))
    ]
    # Where it lies is all that quadrature needs to know.
    precision = sum(sign / v for _, v, sign in parts)
    centre, width = parts[0][0] / parts[0][1] / precision, precision**-0.5
    step = np.longdouble(1) / 10
    x = centre + width * step * np.arange(-130, 131)
    logs = sum(-sign * ((x - mean) ** 2 / v + np.log(2 * np.pi * v)) / 2 for mean, v, sign in parts)
    return float(logs.max() + np.log(width * step * np.exp(logs - logs.max()).sum()))


@pytest.mark.parametrize("loc", [-3.0, -0.4, 0.0, 0.05, 1.0])
@pytest.mark.parametrize("variance", [1e-6, 1e-3, 0.09, 0.9])
@pytest.mark.parametrize("prior_variance", [0.25, 1.0, 4.0])
def test_delta_evidence_against_quadrature(loc, variance, prior_variance):
    for share in (1e-10, 1e-4, 0.1, 0.7, 0.999, 1.0):
        reduced = share * prior_variance
        value = delta_evidence(
            torch.tensor(loc, dtype=torch.float64),
            torch.tensor(variance).double(),
            prior_variance,
            reduced,
        )
        truth = by_quadrature(loc, float(torch.tensor(variance)), prior_variance, reduced)
        assert float(value) == pytest.approx(truth, rel=1e-8, abs=1e-12)


def test_a_reduced_prior_may_be_a_little_wider():
    """Up to where the reduced posterior stops being a distribution."""
    loc, variance = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    for reduced in (1.2, 3.0, 50.0):
        truth = by_quadrature(0.7, 0.5, 1.0, reduced)
        assert float(delta_evidence(loc, variance, 1.0, reduced)) == pytest.approx(truth, rel=1e-8)


def test_the_point_mass_is_the_limit():
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(40, generator=generator, dtype=torch.float64)
    variance = 0.01 + torch.rand(40, generator=generator, dtype=torch.float64)
    point = delta_evidence(loc, variance, 2.0)
    expected = 0.5 * (torch.log(2.0 / variance) - loc.square() / variance)
    torch.testing.assert_close(point, expected, rtol=1e-13, atol=1e-13)
    gaps = [
        float((delta_evidence(loc, variance, 2.0, reduced) - point).abs().max())
        for reduced in (1e-3, 1e-6, 1e-12, 0.0)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == 0
    assert gaps[-2] < 1e-8
    # The Savage-Dickey ratio of the densities at 0.
    q, p = stats.norm(loc.numpy(), variance.sqrt().numpy()), stats.norm(0, math.sqrt(2))
    torch.testing.assert_close(point, torch.from_numpy(q.logpdf(0) - p.logpdf(0)))


def test_a_posterior_equal_to_the_prior_says_nothing():
    zero, one = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1.7, dtype=torch.float64)
    for reduced in (0.0, 1e-6, 0.3, 1.7):
        assert delta_evidence(zero, one, 1.7, reduced).abs().max() < 1e-14


def test_a_narrow_posterior_loses_no_digits():
    """μ²/v (1 − 1/(vP)) is a small difference of large numbers unless written otherwise."""
    loc, variance = torch.tensor(2.0, dtype=torch.float64), torch.tensor(1e-14).double()
    value = delta_evidence(loc, variance, 1.0, 0.5)
    # To first order in v: the ratio of the priors' densities at μ.
    expected = stats.norm(0, math.sqrt(0.5)).logpdf(2.0) - stats.norm(0, 1).logpdf(2.0)
    assert float(value) == pytest.approx(expected, rel=1e-8)


def test_groups_are_sums():
    """Under a mean-field q: log E_q of a product is the sum, also with tied variances."""
    generator = torch.Generator().manual_seed(1)
    loc = 0.3 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    u = 0.5 + torch.rand(3, generator=generator, dtype=torch.float64)
    v = 0.2 + torch.rand(4, generator=generator, dtype=torch.float64)
    q = TiedNormal(loc, u, v)
    total = delta_evidence(q.loc, q.variance, 3.0).sum(1)
    prior = TiedNormal(
        torch.zeros_like(loc), torch.full_like(u, math.sqrt(3.0)), torch.ones(4).double()
    )
    zero = torch.zeros_like(loc)
    torch.testing.assert_close(total, q.log_prob(zero) - prior.log_prob(zero))
    for j in range(3):
        single = [
            by_quadrature(float(loc[j, i]), float((u[j] * v[i]) ** 2), 3.0, 0.4) for i in range(4)
        ]
        value = delta_evidence(q.loc, q.variance, 3.0, 0.4)[j].sum()
        assert float(value) == pytest.approx(sum(single), rel=1e-8)


@pytest.mark.parametrize("reduced", [float("inf"), 1e3])
def test_improper_reduced_posterior(reduced):
    loc, variance = torch.zeros(2), torch.tensor([0.5, 4.0])
    with pytest.raises(ValueError, match="proper posterior"):
        delta_evidence(loc, variance, 1.0, reduced)
    # Just as wide as the prior is the prior.
    assert torch.equal(delta_evidence(loc, variance, 1.0, 1.0), torch.zeros(2))


def covariance(size, seed=2):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def test_joint_groups_are_ratios_of_densities():
    loc, sigma = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), covariance(3)
    zero = torch.zeros(3, dtype=torch.float64)
    prior = MultivariateNormal(zero, 2.0 * torch.eye(3, dtype=torch.float64))
    expected = MultivariateNormal(loc, sigma).log_prob(zero) - prior.log_prob(zero)
    value = delta_evidence_joint(loc, sigma, 2.0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    batch = delta_evidence_joint(torch.stack([loc, -loc]), torch.stack([sigma, sigma]), 2.0)
    torch.testing.assert_close(batch, expected.expand(2), rtol=1e-12, atol=1e-12)


def test_joint_groups_of_independent_numbers():
    loc, variance = torch.tensor([0.3, -2.0, 0.0]).double(), torch.tensor([0.1, 2.0, 0.7]).double()
    value = delta_evidence_joint(loc, variance.diag(), 1.5)
    torch.testing.assert_close(value, delta_evidence(loc, variance, 1.5).sum())
    # Correlated ones differ from the sum over their marginals.
    sigma = covariance(3)
    marginal = delta_evidence(loc, sigma.diagonal(), 1.5).sum()
    assert abs(delta_evidence_joint(loc, sigma, 1.5) - marginal) > 0.1


# -- noise on units --------------------------------------------------------------------------------

LOW, HIGH = -20.0, 0.0
U8 = (-23 * math.log(2), -8 * math.log(2))


def noise(loc, log_scale, dtype=torch.float64):
    loc, log_scale = torch.as_tensor(loc, dtype=dtype), torch.as_tensor(log_scale, dtype=dtype)
    loc, log_scale = torch.broadcast_tensors(loc, log_scale)
    ends = (torch.full_like(loc, LOW), torch.full_like(loc, HIGH))
    return TruncatedLogNormal(loc, log_scale.exp(), *ends)


def log_integral(loc, scale, low, high):
    """log of the integral of exp(-(x − μ)²/2σ²) over an interval, by quadrature."""
    top = min(max(loc, low), high)
    # In units in which the integrand falls by a factor of e within one, and ends after 60.
    slope = abs(top - loc) / scale**2
    unit = min(scale, 1 / slope) if slope else scale
    ends = [max(low, top - 60 * unit), min(high, top + 60 * unit)]
    value, _ = integrate.quad(
        lambda x: math.exp(-(x - top) * (x + top - 2 * loc) / (2 * scale**2)),
        *ends,
        points=[top] if ends[0] < top < ends[1] else None,
        epsabs=0,
        epsrel=1e-12,
        limit=500,
    )
    return -((top - loc) ** 2) / (2 * scale**2) + math.log(value)


GRID = [
    (loc, log_scale)
    for loc in (-30.0, -20.0, -13.0, -5.0, -1.0, 0.0, 5.0)
    for log_scale in (-5.0, -2.0, 0.0, 1.5, 5.0)
]


@pytest.mark.parametrize(("loc", "log_scale"), GRID)
def test_point_reduction_of_a_noise_against_quadrature(loc, log_scale):
    """BMRS_N: (b − a) q(a), whose normaliser carries the factor 2π."""
    scale = math.exp(log_scale)
    truth = math.log(HIGH - LOW) - (LOW - loc) ** 2 / (2 * scale**2)
    truth -= log_integral(loc, scale, LOW, HIGH)
    value = float(delta_evidence_noise(noise(loc, log_scale)))
    assert value == pytest.approx(truth, rel=1e-8, abs=1e-10)


def test_point_reduction_in_closed_form():
    """(b − a) φ(α) / (σ Z), where Z is near 1: no 2π is lost."""
    loc, scale = -18.0, 1.3
    z = stats.norm.cdf((HIGH - loc) / scale) - stats.norm.cdf((LOW - loc) / scale)
    truth = math.log(20 * stats.norm.pdf((LOW - loc) / scale) / (scale * z))
    value = float(delta_evidence_noise(noise(loc, math.log(scale))))
    assert value == pytest.approx(truth, rel=1e-12)


def test_point_reduction_is_the_limit_of_narrow_windows():
    law = noise([-18.0, -3.0, 4.0], [0.3, 0.8, 1.5])
    point = delta_evidence_noise(law)
    gaps = [
        (delta_evidence_noise(law, (LOW, LOW + width)) - point).abs().max()
        for width in (1e-1, 1e-3, 1e-5)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


@pytest.mark.parametrize(("loc", "log_scale"), GRID)
def test_window_reduction_of_a_noise_against_quadrature(loc, log_scale):
    scale = math.exp(log_scale)
    truth = log_integral(loc, scale, *U8) - log_integral(loc, scale, LOW, HIGH)
    truth += math.log(20 / (U8[1] - U8[0]))
    value = float(delta_evidence_noise(noise(loc, log_scale), U8))
    assert value == pytest.approx(truth, rel=1e-8, abs=1e-10)


def test_a_collapsed_unit_has_no_evidence_either_way():
    """Where q = p, ΔF is 0 for every reduced prior."""
    law = noise([-20.0, -10.0, 0.0, 5.0], 18.0)
    for window in (None, U8, (-10.0, -5.0), (LOW, HIGH)):
        torch.testing.assert_close(
            delta_evidence_noise(law, window), torch.zeros(4).double(), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("window", [None, U8])
def test_no_nan_anywhere(window):
    """Over the whole grid that training visits, in both types; gradients where they exist."""
    loc, log_scale = torch.meshgrid(
        torch.linspace(-20, 5, 26), torch.linspace(-10, 5, 31), indexing="ij"
    )
    for dtype in (torch.float32, torch.float64):
        leaves = [part.to(dtype).clone().requires_grad_() for part in (loc, log_scale)]
        value = delta_evidence_noise(noise(*leaves, dtype=dtype), window)
        assert not value.isnan().any()
        assert (value < math.inf).all()
        finite = value.isfinite()
        assert finite.double().mean() > 0.9
        value[finite].sum().backward()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("window", [(-5.0, -5.0), (-4.0, -5.0), (-21.0, -5.0), (-3.0, 0.5)])
def test_windows_that_are_refused(window):
    with pytest.raises(ValueError, match="window within"):
        delta_evidence_noise(noise([-3.0, -4.0], -1.0), window)
