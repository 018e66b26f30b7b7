"""Every closed-form KL against quadrature or enumeration, with its gradients, on a wide grid."""

import itertools
import math
import warnings

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.inverse_gamma import InverseGamma as PyroInverseGamma
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions import (
    HalfCauchyFactors,
    LogUniform,
    RelaxedSpikeAndSlab,
    SpikeAndSlab,
    TiedNormal,
    TruncatedLogNormal,
    TruncatedNormal,
)

LOGITS = [-100.0, -40.0, -8.0, -1.0, 0.0, 0.3, 8.0, 40.0, 100.0]
SCALES = [1e-6, 1e-2, 1.0, 1e3]
HALF_CAUCHY_SCALES = [0.1, 0.5, 1.0, 2.0, 10.0]


def double(value: float | list, grad: bool = False) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


def bernoulli_kl(logit: float, prior_logit: float) -> mpmath.mpf:
    """By enumeration of both values, with enough digits for saturated logits."""
    with mpmath.workdps(120):
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(logit)))
        q = 1 / (1 + mpmath.exp(-mpmath.mpf(prior_logit)))
        return p * mpmath.log(p / q) + (1 - p) * mpmath.log((1 - p) / (1 - q))


def normal_kl(integrate, scale: float, loc: float, prior_scale: float) -> float:
    """N(loc, scale²) from N(0, prior_scale²), by quadrature over the standardised variable."""

    def integrand(x: np.ndarray) -> np.ndarray:
        ratio = ((loc + scale * x) / prior_scale) ** 2 - x**2
        return normal_density(x) * (ratio / 2 + math.log(prior_scale / scale))

    return integrate(integrand, -13, 13)


def log_normal_kl(integrate, loc: float, scale: float, log_density) -> float:
    """From a density of log x, by quadrature over the standardised logarithm."""

    def integrand(t: np.ndarray) -> np.ndarray:
        log_x = loc + scale * t
        log_q = -(t**2) / 2 - math.log(2 * math.pi) / 2 - math.log(scale) - log_x
        return normal_density(t) * (log_q - log_density(log_x))

    return integrate(integrand, -14, 22)


def normal_density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.longdouble(np.pi))


def gamma_log_density(shape: float, rate: float):
    normaliser = shape * math.log(rate) - math.lgamma(shape)
    return lambda log_x: normaliser + (shape - 1) * log_x - rate * np.exp(log_x)


def inverse_gamma_log_density(shape: float, rate: float):
    normaliser = shape * math.log(rate) - math.lgamma(shape)
    return lambda log_x: normaliser - (shape + 1) * log_x - rate * np.exp(-log_x)


def close(value: Tensor, expected: float, rel: float = 1e-9) -> None:
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(float(expected), rel=rel, abs=1e-14)


def finite_with_gradients(value: Tensor, *leaves: Tensor) -> None:
    assert torch.isfinite(value).all(), value
    for gradient in torch.autograd.grad(value.sum(), leaves):
        assert torch.isfinite(gradient).all(), gradient


# Inclusion


@pytest.mark.parametrize(("logit", "prior"), list(itertools.product(LOGITS, LOGITS)))
def test_bernoulli_part(logit: float, prior: float) -> None:
    expected = bernoulli_kl(logit, prior)
    slab = dist.Normal(double(0.3), 0.7)
    close(
        kl_divergence(
            SpikeAndSlab(logits=double(logit), slab=slab),
            SpikeAndSlab(logits=double(prior), slab=slab),
        ),
        expected,
    )
    # The gradient is γ(1 - γ) times the difference of the logits.
    leaf = double(logit, grad=True)
    kl = kl_divergence(SpikeAndSlab(logits=leaf, slab=slab), SpikeAndSlab(logits=prior, slab=slab))
    (gradient,) = torch.autograd.grad(kl, leaf)
    slope = torch.sigmoid(double(logit)) * torch.sigmoid(double(-logit)) * (logit - prior)
    assert gradient.item() == pytest.approx(slope.item(), rel=1e-8, abs=1e-15)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tied", [False, True])
def test_float32_spike_and_slab_is_finite_everywhere(scale: float, tied: bool) -> None:
    grid = torch.tensor(list(itertools.product(LOGITS, LOGITS)))
    logits = grid[:, 0].clone().requires_grad_()
    loc = torch.full((len(grid), 3), 0.3, requires_grad=True)
    sigma = torch.full((len(grid),) if tied else (len(grid), 3), scale, requires_grad=True)
    slab = TiedNormal(loc, sigma, torch.ones(3)) if tied else dist.Normal(loc, sigma).to_event(1)
    prior = dist.Normal(0.0, 1.0).expand([len(grid), 3]).to_event(1)
    kl = kl_divergence(
        RelaxedSpikeAndSlab(0.5, logits=logits, slab=slab),
        SpikeAndSlab(logits=grid[:, 1], slab=prior),
    )
    finite_with_gradients(kl, logits, loc, sigma)
    assert (kl > -1e-3).all()


def test_certain_and_impossible_priors() -> None:
    slab, prior = dist.Normal(double(0.3), 0.7), dist.Normal(double(0.0), 1.0)
    logits = double([-2.0, 40.0], grad=True)
    q = SpikeAndSlab(logits=logits, slab=slab)
    always = kl_divergence(SpikeAndSlab(double(1.0), slab), SpikeAndSlab(double(1.0), prior))
    torch.testing.assert_close(always, kl_divergence(slab, prior))
    never = kl_divergence(SpikeAndSlab(double(0.0), slab), SpikeAndSlab(double(0.0), prior))
    assert never == 0
    assert torch.isinf(kl_divergence(q, SpikeAndSlab(double(0.0), prior))).all()
    excluded = double(-math.inf, grad=True)
    scale = double(0.0, grad=True)
    slab = dist.Normal(double(0.0), scale, validate_args=False)  # an infinite slab KL, gated by 0
    kl = kl_divergence(SpikeAndSlab(logits=excluded, slab=slab), SpikeAndSlab(double(0.5), prior))
    torch.testing.assert_close(kl, double(math.log(2)))


# Slabs


@pytest.mark.parametrize(("scale", "prior_scale"), list(itertools.product(SCALES, [0.1, 1.0, 1e3])))
@pytest.mark.parametrize("logit", [-40.0, 0.3, 40.0])
def test_normal_slabs(integrate, scale: float, prior_scale: float, logit: float) -> None:
    """Every way to write the same two normals gives the value of the quadrature."""
    loc = [0.3, -1.2]
    slab = sum(normal_kl(integrate, scale, m, prior_scale) for m in loc)
    expected = float(bernoulli_kl(logit, -1.0)) + slab / (1 + math.exp(-logit))
    ours = {
        "full": dist.Normal(double(loc), double([scale] * 2)).to_event(1),
        "expanded": dist.Normal(double(loc), double(scale)).to_event(1),
        "tied": TiedNormal(double(loc), double(scale / 2), double([2.0, 2.0])),
    }
    priors = {
        "expanded": dist.Normal(double(0.0), double(prior_scale)).expand([2]).to_event(1),
        "full": dist.Normal(double([0.0] * 2), double([prior_scale] * 2)).to_event(1),
        "tied": TiedNormal(double([0.0] * 2), double(prior_scale * 3), double([1 / 3] * 2)),
    }
    for (name, q), (prior_name, p) in itertools.product(ours.items(), priors.items()):
        if prior_name == "tied" and name != "tied":
            continue
        close(kl_divergence(q, p), slab)
        law = RelaxedSpikeAndSlab(0.5, logits=double(logit), slab=q)
        close(kl_divergence(law, SpikeAndSlab(logits=double(-1.0), slab=p)), expected)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_tied_normal_against_every_layout_of_the_prior(batch: tuple) -> None:
    m = 4
    tied = TiedNormal(
        torch.randn(*batch, m).double(),
        torch.rand(batch).double() + 0.5,
        torch.rand(m).double() + 0.5,
    )
    same = dist.Normal(tied.loc, tied.scale).to_event(1)
    loc, scale = torch.randn(*batch, m).double(), torch.rand(*batch, m).double() + 0.5
    scalar = double(0.7)
    per_row = (torch.rand(*batch, 1).double() + 0.5).expand(*batch, m)
    per_column = (torch.rand(m).double() + 0.5).expand(*batch, m)
    for prior_scale in (scale, scalar.expand(*batch, m), per_row, per_column):
        prior = dist.Normal(loc, prior_scale).to_event(1)
        kl = kl_divergence(tied, prior)
        assert kl.shape == batch
        torch.testing.assert_close(kl, kl_divergence(same, prior), rtol=1e-12, atol=1e-12)
        gated = kl_divergence(
            SpikeAndSlab(logits=torch.full(batch, 40.0).double(), slab=same),
            SpikeAndSlab(logits=torch.full(batch, 40.0).double(), slab=prior),
        )
        torch.testing.assert_close(gated, kl, rtol=1e-12, atol=1e-12)
        if batch:
            nested = kl_divergence(tied.to_event(1), prior.to_event(1))
            torch.testing.assert_close(nested, kl.sum(-1))
    prior = TiedNormal(loc, torch.rand(batch).double() + 0.5, torch.rand(m).double() + 0.5)
    torch.testing.assert_close(
        kl_divergence(tied, prior),
        kl_divergence(same, dist.Normal(prior.loc, prior.scale).to_event(1)),
    )


def test_a_learnt_prior_scale_gets_its_gradient() -> None:
    """Also where the prior's scale is one number, expanded over all weights."""
    loc = torch.randn(3, 4).double()

    def kl(prior_scale: Tensor, family: str) -> Tensor:
        prior = dist.Normal(torch.zeros(3, 4).double(), prior_scale.expand(3, 4)).to_event(1)
        tied = TiedNormal(loc, torch.ones(3).double(), torch.ones(4).double())
        slab = tied if family == "tied" else dist.Normal(loc, 1.0).to_event(1)
        return kl_divergence(SpikeAndSlab(double(0.3), slab), SpikeAndSlab(double(0.2), prior))

    for family in ("tied", "full"):
        assert torch.autograd.gradcheck(lambda s, f=family: kl(s, f), [double(0.7, grad=True)])


@pytest.mark.parametrize("slab", ["full", "tied"])
@pytest.mark.parametrize("logit", [-40.0, -1.0, 0.5, 40.0])
def test_gradients_of_the_joint_kl(slab: str, logit: float) -> None:
    prior = SpikeAndSlab(double(0.1), dist.Normal(double(0.0), 0.8).expand([3, 4]).to_event(1))

    def kl(logits: Tensor, loc: Tensor, row: Tensor, column: Tensor) -> Tensor:
        scale = row[:, None] * column
        law = (
            TiedNormal(loc, row, column) if slab == "tied" else dist.Normal(loc, scale).to_event(1)
        )
        return kl_divergence(RelaxedSpikeAndSlab(0.5, logits=logits, slab=law), prior)

    leaves = [double([logit] * 3), torch.randn(3, 4).double()]
    leaves += [torch.rand(3).double() + 0.5, torch.rand(4).double() + 0.5]
    assert torch.autograd.gradcheck(kl, [leaf.requires_grad_() for leaf in leaves])


def test_other_slabs_use_their_registered_kl() -> None:
    q, p = dist.Gamma(double([2.0, 3.0]), 1.0), dist.Gamma(double([1.0, 1.0]), 2.0)
    half = double([0.0, 0.0])
    kl = kl_divergence(SpikeAndSlab(logits=half, slab=q), SpikeAndSlab(logits=half, slab=p))
    torch.testing.assert_close(kl, 0.5 * kl_divergence(q, p))


def test_groups_of_different_length_are_refused() -> None:
    def law(length: int) -> SpikeAndSlab:
        return SpikeAndSlab(0.5, dist.Normal(torch.zeros(length), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"event shape \(3,\) against \(4,\)"):
        kl_divergence(law(3), law(4))
    tied = TiedNormal(torch.zeros(3), 1.0, torch.ones(3))
    with pytest.raises(NotImplementedError, match="TiedNormal"):
        kl_divergence(tied, dist.Laplace(torch.zeros(3), 1.0).to_event(1))


# Scales


@pytest.mark.parametrize(("shape", "rate"), [(0.5, 1.0), (0.5, 100.0), (4.0, 2.0), (393.0, 0.01)])
@pytest.mark.parametrize(("loc", "scale"), [(-0.6, 1e-6), (0.0, 0.3), (2.0, 1.0), (-5.0, 2.5)])
def test_log_normal_pairs(integrate, shape: float, rate: float, loc: float, scale: float) -> None:
    q = dist.LogNormal(double(loc), double(scale))
    a, b = double(shape), double(rate)
    gamma = log_normal_kl(integrate, loc, scale, gamma_log_density(shape, rate))
    inverse = log_normal_kl(integrate, loc, scale, inverse_gamma_log_density(shape, rate))
    for family in (torch.distributions, dist):
        q = family.LogNormal(double(loc), double(scale))
        close(kl_divergence(q, family.Gamma(a, b)), gamma)
        close(kl_divergence(q, family.InverseGamma(a, b)), inverse)
    close(kl_divergence(q, PyroInverseGamma(a, b)), inverse)


def test_gradients_of_log_normal_pairs() -> None:
    leaves = [double([-0.6, 1.0], True), double([0.3, 1.5], True), double([0.5, 4.0], True)]
    leaves.append(double([2.0, 0.1], True))
    for family in (dist.Gamma, dist.InverseGamma):
        assert torch.autograd.gradcheck(
            lambda m, s, a, b, f=family: kl_divergence(dist.LogNormal(m, s), f(a, b)), leaves
        )


@pytest.mark.parametrize("prior_scale", HALF_CAUCHY_SCALES)
@pytest.mark.parametrize(("loc", "scale"), [(-0.6, 1e-6), (0.6, 0.3), (-2.0, 2.0)])
def test_half_cauchy_factors(integrate, prior_scale: float, loc: float, scale: float) -> None:
    """Scales other than 1 included, where formulas that are right at 1 go wrong."""
    expected = log_normal_kl(integrate, loc, scale, gamma_log_density(0.5, prior_scale**-2))
    expected += log_normal_kl(integrate, -loc, scale, inverse_gamma_log_density(0.5, 1.0))
    q = dist.LogNormal(double([loc, -loc]), double([scale, scale])).to_event(1)
    p = HalfCauchyFactors(double(prior_scale))
    close(kl_divergence(q, p), expected)
    for units in [(3,), (2, 3)]:
        law = dist.LogNormal(double([loc, -loc]), double(scale)).expand([*units, 2])
        kl = kl_divergence(law.to_event(len(units) + 1), p.expand(units).to_event(len(units)))
        torch.testing.assert_close(kl.item() / math.prod(units), float(expected), rtol=1e-9, atol=0)
        assert kl_divergence(law.to_event(1), p.expand(units)).shape == units


def test_gradients_of_half_cauchy_factors() -> None:
    leaves = [double([[0.1, -0.4]], True), double([[0.3, 1.1]], True), double([2.0], True)]
    assert torch.autograd.gradcheck(
        lambda m, s, t: kl_divergence(dist.LogNormal(m, s).to_event(1), HalfCauchyFactors(t)),
        leaves,
    )
    with pytest.raises(NotImplementedError, match="HalfCauchyFactors"):
        kl_divergence(dist.Gamma(torch.ones(2), 1.0).to_event(1), HalfCauchyFactors(1.0))


def test_float32_scales_are_finite_everywhere() -> None:
    grid = itertools.product([-20.0, -0.6, 0.0, 5.0], [1e-6, 1e-2, 1.0, 5.0], HALF_CAUCHY_SCALES)
    locs, scales, priors = torch.tensor(list(grid)).unbind(-1)
    loc = torch.stack([locs, -locs], -1).requires_grad_()
    scale = scales[:, None].expand(-1, 2).clone().requires_grad_()
    q = dist.LogNormal(loc, scale)
    finite_with_gradients(kl_divergence(q.to_event(1), HalfCauchyFactors(priors)), loc, scale)
    for shape in (0.5, 4.0, 400.0):
        for family in (dist.Gamma, dist.InverseGamma):
            prior = family(torch.full_like(loc, shape), priors[:, None].expand(-1, 2))
            finite_with_gradients(kl_divergence(q, prior), loc, scale)


# Truncated pairs

NOISE = list(
    itertools.product([-20.0, -15.0, -1.0, 0.0, 1e-3, 0.5, 5.0], [-10.0, -5.0, -3.0, 0.0, 5.0])
)


@pytest.mark.parametrize(("loc", "log_scale"), NOISE)
def test_truncated_pairs(loc: float, log_scale: float) -> None:
    """Against the textbook formula with 120 digits, quadrature being in test_truncated."""
    low, high, scale = -20.0, 0.0, math.exp(log_scale)
    with mpmath.workdps(120):
        m, s = mpmath.mpf(loc), mpmath.mpf(scale)
        a, b = (low - m) / s, (high - m) / s
        z = (mpmath.erfc(a / mpmath.sqrt(2)) - mpmath.erfc(b / mpmath.sqrt(2))) / 2
        if b < 0:
            z = (mpmath.erfc(-b / mpmath.sqrt(2)) - mpmath.erfc(-a / mpmath.sqrt(2))) / 2
        expected = (
            mpmath.log(high - low)
            - mpmath.log(s * z)
            - mpmath.log(2 * mpmath.pi * mpmath.e) / 2
            - (a * mpmath.npdf(a) - b * mpmath.npdf(b)) / (2 * z)
        )
    arguments = double(loc), double(scale), low, high
    close(kl_divergence(TruncatedLogNormal(*arguments), LogUniform(double(low), high)), expected)
    close(kl_divergence(TruncatedNormal(*arguments), dist.Uniform(double(low), high)), expected)
    wider = kl_divergence(TruncatedNormal(*arguments), dist.Uniform(double(-30.0), 10.0))
    close(wider, expected + mpmath.log(2))
    assert kl_divergence(TruncatedNormal(*arguments), dist.Uniform(double(-19.0), 0.0)) == math.inf


def test_gradients_of_truncated_pairs() -> None:
    loc, log_scale = (double(list(column), True) for column in zip(*NOISE, strict=True))

    def kl(loc: Tensor, log_scale: Tensor) -> Tensor:
        q = TruncatedLogNormal(loc, log_scale.exp(), -20.0, 0.0)
        return kl_divergence(q, LogUniform(double(-20.0), 0.0))

    # gradcheck's step must be small against the narrowest scale, exp(-10).
    assert torch.autograd.gradcheck(kl, [loc, log_scale], eps=1e-8, atol=1e-5, rtol=1e-4)


def test_float32_truncated_pairs_are_finite_everywhere() -> None:
    loc, log_scale = torch.meshgrid(
        torch.linspace(-20, 5, 51), torch.linspace(-10, 5, 31), indexing="ij"
    )
    loc, log_scale = loc.clone().requires_grad_(), log_scale.clone().requires_grad_()
    q = TruncatedLogNormal(loc, log_scale.exp(), -20.0, 0.0)
    kl = kl_divergence(q, LogUniform(-20.0, 0.0))
    finite_with_gradients(kl, loc, log_scale)
    assert (kl >= 0).all()


def test_figures_of_the_usual_start_of_structured_pruning() -> None:
    q = TruncatedLogNormal(double(0.0), double(math.exp(-5)), -20.0, 0.0)
    kl = kl_divergence(q, LogUniform(double(-20.0), 0.0))
    assert kl.item() == pytest.approx(7.27, abs=5e-3)
    assert q.signal_to_noise.item() == pytest.approx(247, abs=0.5)


# Dispatch


def test_no_pair_is_ambiguous() -> None:
    """torch warns where two registrations fit equally well; all pairs of our classes are tried."""
    rows = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    laws = [
        SpikeAndSlab(0.5, rows),
        RelaxedSpikeAndSlab(0.5, 0.5, rows),
        RelaxedSpikeAndSlab(0.5, 0.5, rows).expand([3]).to_event(1),
        TiedNormal(torch.zeros(2), 1.0, torch.ones(2)),
        HalfCauchyFactors(1.0),
        TruncatedNormal(0.0, 1.0, -1.0, 1.0),
        TruncatedLogNormal(0.0, 1.0, -1.0, 1.0),
        LogUniform(-1.0, 1.0),
        dist.LogNormal(0.0, 1.0),
        dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
        dist.InverseGamma(1.0, 1.0),
        dist.Gamma(1.0, 1.0),
        dist.Bernoulli(0.5),
        dist.Uniform(-1.0, 1.0),
        dist.Delta(torch.tensor(0.5)),
        rows,
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for q, p in itertools.product(laws, laws):
            try:
                kl_divergence(q, p)
            except (NotImplementedError, ValueError):
                continue


@pytest.mark.parametrize("tied", [False, True])
def test_one_row_against_several_priors(tied: bool) -> None:
    """A prior with more rows than the posterior has gives a KL for each of them."""
    loc, ones = torch.randn(4).double(), torch.ones(4).double()
    p = TiedNormal(loc, 0.3, ones) if tied else dist.Normal(loc, 0.3 * ones).to_event(1)
    q = dist.Normal(torch.zeros(3, 4).double(), double(0.7)).to_event(1)
    kl = kl_divergence(p, q)
    assert kl.shape == (3,)
    close(
        kl[0],
        sum(kl_divergence(dist.Normal(m, 0.3), dist.Normal(0.0, 0.7)) for m in loc.float()),
        1e-6,
    )


def test_a_prior_that_is_changed_in_place() -> None:
    """What is remembered of a prior is what its numbers are now."""
    scale, zero = double([0.7]), double([0.0])
    p, q = dist.Normal(double([0.1]), double([0.3])), dist.Normal(zero, scale)
    for change in (lambda: None, lambda: scale.fill_(2.0), lambda: zero.fill_(1.0)):
        change()
        fresh = dist.Normal(zero.clone(), scale.clone())
        torch.testing.assert_close(kl_divergence(p, q), kl_divergence(p, fresh))
