"""Truncated laws, with the location inside, at the edge of, and far outside the interval."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_sparse.distributions import LogUniform, TruncatedLogNormal, TruncatedNormal

CASES = [
    # loc, scale, low, high
    (0.3, 1.0, -1.0, 2.0),
    (0.0, math.exp(-5), -20.0, 0.0),
    (-1.0, math.exp(-3), -20.0, 0.0),
    (-15.0, 0.05, -20.0, 0.0),
    (-25.0, 0.5, -20.0, 0.0),
    (5.0, math.exp(-3), -20.0, 0.0),
    (5.0, math.exp(-10), -20.0, 0.0),
    (-10.0, math.exp(5), -20.0, 0.0),
    (1e4, 30.0, -1.0, 1.0),
    (0.0, 1e-6, -1.0, 1.0),
    (0.0, 1e3, -1.0, 1.0),
]


def double(value: float | list, grad: bool = False) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("case", CASES)
def test_statistics_against_quadrature(integrate, case: tuple) -> None:
    """Relative to the mode, so that the quadrature itself does not cancel in the tails."""
    loc, scale, low, high = map(np.longdouble, case)
    mode = min(max(loc, low), high)
    slope = abs(loc - mode) / scale
    reach = scale * 120 / (slope + np.sqrt(slope**2 + 120))

    def expect(function) -> np.longdouble:
        def integrand(r: np.ndarray) -> np.ndarray:
            return function(r) * np.exp(-r * (r + 2 * (mode - loc)) / (2 * scale**2))

        return integrate(integrand, max(low - mode, -reach), min(high - mode, reach))

    total = expect(lambda r: 1)
    mean = expect(lambda r: r) / total
    variance = expect(lambda r: (r - mean) ** 2) / total
    growth = expect(np.expm1) / total
    noise = expect(lambda r: (np.expm1(r) - growth) ** 2) / total
    entropy = np.log(total) + expect(lambda r: r * (r + 2 * (mode - loc))) / (2 * scale**2 * total)
    log_mean = mode + np.log1p(growth)
    log_square = 2 * log_mean + np.log1p(noise / (1 + growth) ** 2)

    law = TruncatedNormal(*(double(v) for v in case))
    assert law.mean.item() == pytest.approx(float(mode + mean), rel=1e-11, abs=1e-14)
    assert law.variance.item() == pytest.approx(float(variance), rel=1e-10)
    assert law.entropy().item() == pytest.approx(float(entropy), rel=1e-11, abs=1e-12)
    law = TruncatedLogNormal(*(double(v) for v in case))
    assert law.log_mean().item() == pytest.approx(float(log_mean), rel=1e-10, abs=1e-14)
    assert law.log_second_moment().item() == pytest.approx(float(log_square), rel=1e-10, abs=1e-14)
    assert law.mean.item() == pytest.approx(float(np.exp(log_mean)), rel=1e-10)
    assert law.variance.item() == pytest.approx(float(np.exp(2 * mode) * noise), rel=1e-4)
    assert law.entropy().item() == pytest.approx(float(entropy + mode + mean), rel=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_density_and_distribution_function_agree(case: tuple) -> None:
    """The density integrates to the distribution function, which inverts the quantiles."""
    law = TruncatedNormal(*(double(v) for v in case))
    probability = torch.linspace(0, 1, 1001, dtype=torch.float64)
    quantiles = law.icdf(probability)
    assert (quantiles >= law.low).all()
    assert (quantiles <= law.high).all()
    # A quantile next to a bound is only known to the rounding of the bound.
    resolution = law.log_prob(quantiles).exp() * quantiles.abs() * 1e-15
    assert ((law.cdf(quantiles) - probability).abs() <= 1e-12 + resolution).all()
    grid = law.icdf(double([0.001, 0.999])).detach()
    x = torch.linspace(*grid.tolist(), 20_001, dtype=torch.float64)
    for distribution, values in [
        (law, x),
        (TruncatedLogNormal(*(double(v) for v in case)), x.clamp(max=300).exp()),
    ]:
        mass = torch.trapezoid(distribution.log_prob(values).exp(), values)
        assert mass.item() == pytest.approx(0.998, rel=3e-4)


def test_against_scipy_in_the_centre() -> None:
    law = TruncatedNormal(double(0.3), double(0.8), -1.0, 2.0)
    reference = stats.truncnorm(-1.3 / 0.8, 1.7 / 0.8, loc=0.3, scale=0.8)
    x = torch.linspace(-1, 2, 31).double()
    torch.testing.assert_close(law.log_prob(x), torch.from_numpy(reference.logpdf(x.numpy())))
    torch.testing.assert_close(law.cdf(x), torch.from_numpy(reference.cdf(x.numpy())))
    assert law.variance.item() == pytest.approx(reference.var(), rel=1e-10)
    assert law.entropy().item() == pytest.approx(float(reference.entropy()), rel=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_law(case: tuple) -> None:
    count = 10_000
    law = TruncatedNormal(*(double(v) for v in case)).expand((count,))
    sample = law.sample()
    assert stats.kstest(law.cdf(sample).numpy(), "uniform").pvalue > 1e-3
    error = 5 * (law.variance[0] / count).sqrt()
    assert (sample.mean() - law.mean[0]).abs() < error + 1e-15 * abs(case[0])
    exponential = TruncatedLogNormal(*(torch.tensor(v) for v in case)).expand((100,))
    assert torch.isfinite(exponential.log_prob(exponential.sample())).all()


@pytest.mark.parametrize("case", [c for c in CASES if c[1] > 1e-3])
def test_sample_gradients(case: tuple) -> None:
    """Implicit derivatives of the quantiles against differences of the quantile function."""
    loc, scale, low, high = case
    probability = double([0.02, 0.3, 0.5, 0.9, 0.999])

    def quantiles(loc: Tensor, scale: Tensor) -> Tensor:
        return TruncatedNormal(loc, scale, low, high).icdf(probability)

    leaves = [double(loc, True), double(scale, True)]
    for position in range(2):
        by_hand = torch.stack(
            [
                torch.autograd.grad(q, leaves, retain_graph=True)[position]
                for q in quantiles(*leaves)
            ]
        )
        step = 1e-4 * scale
        ends = []
        for sign in (1, -1):
            moved = [leaf.detach().clone() for leaf in leaves]
            moved[position] += sign * step
            ends.append(quantiles(*moved))
        difference = (ends[0] - ends[1]) / (2 * step)
        # Rounding of the ends, next to that of the derivative itself.
        noise = 1e-15 * max(abs(low), abs(high)) / step + 1e-12 * abs(loc - high) / scale
        torch.testing.assert_close(by_hand, difference, rtol=1e-5, atol=1e-9 + noise)


def test_sample_gradient_far_outside() -> None:
    """Far above the interval, x = high - E σ²/(loc - high) with an exponential E."""
    loc, scale = double(1e4, True), double(30.0, True)
    uniform = double(0.3)
    exponential = -math.log(0.3)
    x = TruncatedNormal(loc, scale, -1000.0, 0.0).icdf(uniform)
    by_loc, by_scale = torch.autograd.grad(x, [loc, scale])
    assert x.item() == pytest.approx(-exponential * 900 / 1e4, rel=1e-4)
    assert by_loc.item() == pytest.approx(exponential * 900 / 1e8, rel=1e-4)
    assert by_scale.item() == pytest.approx(-exponential * 60 / 1e4, rel=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c[1] > 1e-3])
def test_gradients_of_statistics(case: tuple) -> None:
    loc, scale, low, high = case
    # In units of the scale, so that one step size fits all cases.
    value = TruncatedNormal(double(loc), double(scale), low, high).icdf(double([0.2, 0.8]))

    def statistics(position: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        law = TruncatedNormal(loc + scale * position, scale * factor, low, high)
        exponential = TruncatedLogNormal(law.loc, law.scale, low, high)
        return (
            law.mean / scale,
            law.variance / scale**2,
            law.entropy(),
            law.log_prob(value),
            law.log_mass(low, value),
            exponential.log_mean(),
            exponential.log_second_moment(),
        )

    leaves = [double(0.0, True), double(1.0, True)]
    assert torch.autograd.gradcheck(statistics, leaves, eps=1e-5, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [TruncatedNormal, TruncatedLogNormal])
class TestParts:
    """Of a law of several groups, drawn and measured together."""

    SIZES = (2, 1, 3)

    def whole(self, family: type, leaves: list[Tensor]) -> TruncatedNormal:
        return family(leaves[0], leaves[1].exp(), -20.0, 0.0)

    def leaves(self) -> list[Tensor]:
        return [double([-1.0, -0.1, -3.0, 0.0, 2.0, -19.0], True), double([-2.0] * 6, True)]

    def test_have_the_laws_statistics(self, family: type) -> None:
        leaves = self.leaves()
        whole = self.whole(family, leaves)
        parts = whole.split(self.SIZES)
        assert [part.batch_shape for part in parts] == [(2,), (1,), (3,)]
        value = whole.icdf(double([0.1, 0.4, 0.5, 0.6, 0.7, 0.9])).detach()
        at = value.split(self.SIZES)
        for together, apart in (
            (whole.entropy(), [part.entropy() for part in parts]),
            (whole.mean, [part.mean for part in parts]),
            (whole.log_prob(value), [p.log_prob(v) for p, v in zip(parts, at, strict=True)]),
        ):
            torch.testing.assert_close(torch.cat(apart), together)
            weights = torch.arange(1.0, 7.0)
            gradients = [
                torch.autograd.grad((weights * all_of_them).sum(), leaves, retain_graph=True)
                for all_of_them in (torch.cat(apart), together)
            ]
            torch.testing.assert_close(*gradients)

    def test_draws_are_the_laws_and_new_each_time(self, family: type) -> None:
        torch.manual_seed(0)
        leaves = self.leaves()
        first, second, third = self.whole(family, leaves).split(self.SIZES)
        draws = [third.rsample((500,)), third.rsample((500,)), third.rsample((500,))]
        assert draws[0].shape == (500, 3)
        for unit in range(3):
            law = self.whole(family, leaves).split((3, 3))[1]
            for draw in draws:
                one = family(law.loc[unit].detach(), law.scale[unit].detach(), -20.0, 0.0)
                assert stats.kstest(one.cdf(draw[:, unit].detach()), "uniform").pvalue > 1e-3
        pair = torch.stack([draw[:, 0].detach() for draw in draws[:2]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.2
        # Whoever was not asked yet has a draw of another shape waiting for it, or of this one.
        assert first.rsample().shape == (2,)
        assert second.rsample((500,)).shape == (500, 1)
        gradient = torch.autograd.grad(draws[2].sum(), leaves)
        assert bool((gradient[0][3:] != 0).all())
        assert bool((gradient[0][:3] == 0).all())


def test_float32_is_finite_everywhere() -> None:
    loc, log_scale = torch.meshgrid(
        torch.linspace(-20, 5, 51), torch.linspace(-10, 5, 31), indexing="ij"
    )
    leaves = [loc.clone().requires_grad_(), log_scale.clone().requires_grad_()]
    law = TruncatedLogNormal(leaves[0], leaves[1].exp(), -20.0, 0.0)
    sample = law.rsample()
    statistics = {
        "mean": law.mean,
        "variance": law.variance,
        "log mean": law.log_mean(),
        "log second moment": law.log_second_moment(),
        "signal to noise": law.signal_to_noise.log(),
        "entropy": law.entropy(),
        "sample": sample,
        "log prob": law.log_prob(sample.detach()),
        "log mass": law.log_distribution.log_mass(-20.0, -15.0).clamp(min=-1e30),
    }
    for name, value in statistics.items():
        assert torch.isfinite(value).all(), name
        for gradient in torch.autograd.grad(value.sum(), leaves, retain_graph=True):
            assert torch.isfinite(gradient).all(), name
    assert (law.mean > 0).all()
    assert (law.mean <= 1).all()


def test_figures_that_naive_float32_gets_wrong() -> None:
    law = TruncatedLogNormal(torch.tensor(-1.0), torch.tensor(math.exp(-3)), -20.0, 0.0)
    assert law.mean.item() == pytest.approx(0.368, abs=1e-3)
    assert law.signal_to_noise.item() == pytest.approx(20.07, abs=0.01)
    flat = TruncatedLogNormal(torch.tensor(-10.0), torch.tensor(1e4), -20.0, 0.0)
    assert flat.mean.item() == pytest.approx(1 / 20, rel=1e-4)
    assert flat.signal_to_noise.item() == pytest.approx(1 / 3, rel=1e-3)


def test_log_mass() -> None:
    law = TruncatedNormal(double(0.3), double(0.8), -1.0, 2.0)
    torch.testing.assert_close(law.log_mass(-1.0, 2.0), double(0.0), atol=1e-14, rtol=0)
    torch.testing.assert_close(law.log_mass(-9.0, 9.0), double(0.0), atol=1e-14, rtol=0)
    torch.testing.assert_close(
        law.log_mass(0.0, 0.5).exp(), law.cdf(double(0.5)) - law.cdf(double(0.0))
    )
    assert law.log_mass(3.0, 4.0) == -math.inf
    # A mass of exp(-5000), which differences of Φ lose.
    far = TruncatedNormal(double(0.0), double(0.01), -1.0, 1.0)
    with mpmath.workdps(30):
        expected = mpmath.log(
            (mpmath.erfc(99 / mpmath.sqrt(2)) - mpmath.erfc(100 / mpmath.sqrt(2))) / 2
        )
    assert far.log_mass(0.99, 1.0).item() == pytest.approx(float(expected), rel=1e-12)


def test_log_uniform() -> None:
    law = LogUniform(double(-2.0), double(1.0))
    reference = stats.loguniform(math.exp(-2), math.exp(1))
    x = double([0.14, 0.5, 2.0])
    torch.testing.assert_close(law.log_prob(x), torch.from_numpy(reference.logpdf(x.numpy())))
    torch.testing.assert_close(law.cdf(x), torch.from_numpy(reference.cdf(x.numpy())))
    torch.testing.assert_close(law.icdf(law.cdf(x)), x)
    assert law.mean.item() == pytest.approx(reference.mean())
    assert law.variance.item() == pytest.approx(reference.var())
    assert law.entropy().item() == pytest.approx(float(reference.entropy()), rel=1e-6)
    sample = law.sample((10_000,))
    assert stats.kstest(sample.numpy(), reference.cdf).pvalue > 1e-3
    # The upper end, 1, is in the support of the usual noise prior.
    assert torch.isfinite(LogUniform(-20.0, 0.0).log_prob(torch.tensor([1.0, math.exp(-20)]))).all()
    low = double(-2.0, True)
    (gradient,) = torch.autograd.grad(LogUniform(low, 1.0).icdf(double(0.25)), low)
    assert gradient.item() == pytest.approx(0.75 * math.exp(-1.25))


@pytest.mark.parametrize("family", [TruncatedNormal, TruncatedLogNormal])
def test_shapes(family) -> None:
    law = family(torch.zeros(3, 1), torch.ones(4), -1.0, 1.0)
    assert law.batch_shape == (3, 4)
    wide = law.expand((2, 3, 4))
    assert type(wide) is family
    assert wide.rsample((5,)).shape == (5, 2, 3, 4)
    assert wide.to_event(2).log_prob(wide.sample()).shape == (2,)
    assert wide.mask(False).log_prob(wide.sample()).shape == (2, 3, 4)
    assert law.sample().dtype == law.mean.dtype == law.variance.dtype == torch.float32
    assert LogUniform(torch.zeros(3), 1.0).expand((2, 3)).to_event(1).sample((5,)).shape == (
        5,
        2,
        3,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TruncatedNormal(0.0, 1.0, 1.0, -1.0),
            "TruncatedNormal needs bounds with low < high",
        ),
        (lambda: LogUniform(-math.inf, 0.0), "finite bounds with low < high"),
        (lambda: LogUniform(0.0, 0.0), "LogUniform needs finite bounds"),
        (lambda: TruncatedNormal(0.0, -1.0, 0.0, 1.0), "parameter scale"),
        (lambda: TruncatedNormal(math.nan, 1.0, 0.0, 1.0), "parameter loc"),
        (lambda: TruncatedNormal(0.0, 1.0, 0.0, 1.0).log_prob(torch.tensor(2.0)), "support"),
        (lambda: TruncatedLogNormal(0.0, 1.0, 0.0, 1.0).log_prob(torch.tensor(0.5)), "support"),
        (lambda: LogUniform(0.0, 1.0).log_prob(torch.tensor(3.0)), "support"),
    ],
)
def test_validation(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_outside_the_support_the_density_is_zero() -> None:
    outside = torch.tensor([0.5, 1.5, 5.0])
    for law in (
        TruncatedNormal(1.0, 1.0, 1.0, 2.0, validate_args=False),
        TruncatedLogNormal(1.0, 1.0, 0.0, 1.0, validate_args=False),
        LogUniform(0.0, 1.0, validate_args=False),
    ):
        assert torch.isinf(law.log_prob(outside)).tolist() == [True, False, True]


@pytest.mark.parametrize("loc", [0.3, -4.0, 9.0])
@pytest.mark.parametrize(
    "statistic",
    [
        lambda law, value: law.log_prob(value),
        lambda law, value: law.cdf(value),
        lambda law, value: law.icdf(0.3 + value / 10),
        lambda law, value: law.mean + law.variance + law.entropy(),
    ],
    ids=["log_prob", "cdf", "icdf", "moments"],
)
@pytest.mark.parametrize("family", [TruncatedNormal, TruncatedLogNormal])
def test_derivatives_in_bounds_and_of_second_order(family, statistic, loc: float) -> None:
    numbers = [loc, 0.8, -1.0, 2.0, 1.3]
    inputs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in numbers]

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        *parameters, value = inputs
        return statistic(family(*parameters, validate_args=False), value)

    assert torch.autograd.gradcheck(function, inputs, rtol=1e-4)
    assert torch.autograd.gradgradcheck(function, inputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, math.inf), (-math.inf, -9.0), (-math.inf, math.inf)]
)
def test_one_sided(low: float, high: float) -> None:
    law = TruncatedNormal(torch.tensor(0.4, dtype=torch.float64), 1.2, low, high)
    reference = stats.truncnorm((low - 0.4) / 1.2, (high - 0.4) / 1.2, 0.4, 1.2)
    probability = torch.tensor([0.01, 0.4, 0.97], dtype=torch.float64)
    quantiles = law.icdf(probability)
    torch.testing.assert_close(
        quantiles, torch.from_numpy(reference.ppf(probability)), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(law.cdf(quantiles), probability, rtol=1e-8, atol=0)
    expected = torch.from_numpy(reference.logpdf(quantiles))
    torch.testing.assert_close(law.log_prob(quantiles), expected, rtol=1e-8, atol=1e-8)
    assert float(law.mean) == pytest.approx(reference.mean(), rel=1e-8)
    grid = law.icdf((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    assert float(law.entropy()) == pytest.approx(float(-law.log_prob(grid).mean()), abs=1e-3)
    point = torch.distributions.biject_to(law.support)(torch.zeros((), dtype=torch.float64))
    assert law.log_prob(point).isfinite()


def test_under_torch_func() -> None:
    x = torch.tensor([0.2, 0.4]).double()
    loc = torch.tensor([0.1, 3.5]).double()

    def log_prob(loc: torch.Tensor) -> torch.Tensor:
        return TruncatedNormal(loc, 1.0, -1.0, 2.0, validate_args=False).log_prob(x).sum()

    found = torch.func.vmap(torch.func.grad(log_prob))(loc)
    expected = [torch.autograd.grad(log_prob(v), v)[0] for v in loc.clone().requires_grad_()]
    torch.testing.assert_close(found, torch.stack(expected))


def test_integers_become_floating_point() -> None:
    law = TruncatedNormal(torch.tensor(0), torch.tensor(1), -1, 1)
    assert law.sample((4,)).unique().numel() == 4
    assert TruncatedNormal(torch.tensor([0, 1]), 1.5, -1.0, 1.0).scale[0] == 1.5
