r"""Normal and log-normal distributions truncated to an interval, in any tail.

The textbook formulas, differences of Φ divided by Z = Φ(β) - Φ(α), underflow or cancel as soon as
the location leaves the interval by a few scales. Here every statistic is a sum of positive terms:
a Gauss-Legendre rule in float64 on that part of [low, high] which holds all but 1e-17 of the mass,
relative to the mode. The density is entire and falls by a fixed factor there, so that 48 nodes
reach rounding error in the centre and in the tails alike. Gradients are moments of the same rule.

Either end may be infinite. Statistics, densities and samples are differentiable in all parameters
and in values, as often as one likes; once in loc and scale is what is fast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_sparse.distributions.analytic import Fused, broadcast_floating, is_transformed

__all__ = ["LogUniform", "TruncatedLogNormal", "TruncatedNormal"]

_NODES = 48
_DROP = 40.0  # the rule ends where the log density is this far below its maximum
_TAIL = 5.0  # standardised distance from which samples are drawn in the tail's own scale
_SLOPE = math.sqrt(math.pi / 2)  # erfcx(x / √2) times this is 1 over the hazard rate at x
_FAR = 1e150
_FEW = 4096  # up to so many draws the tail is computed whether there is one or not


class _Truncated(TorchDistribution):
    """Parameters of a normal distribution and the interval that it is conditioned on."""

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "low": constraints.dependent(is_discrete=False, event_dim=0),
        "high": constraints.dependent(is_discrete=False, event_dim=0),
    }
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: Tensor | float,
        high: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.low, self.high = broadcast_floating(loc, scale, low, high)
        super().__init__(self.loc.shape, validate_args=validate_args)
        if self._validate_args:
            _check_bounds(self)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(_Truncated, _instance)
        batch_shape = torch.Size(batch_shape)
        for name in ("loc", "scale", "low", "high"):
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(_Truncated, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


class TruncatedNormal(_Truncated):
    r"""A normal distribution conditioned on an interval.

    .. math::
        p(x) = \frac{\exp\{-(x - \mu)^2 / (2 \sigma^2)\}}{\sqrt{2 \pi}\, \sigma Z}, \quad
        \text{low} \le x \le \text{high}, \quad
        Z = \Phi\Big(\frac{\text{high} - \mu}{\sigma}\Big)
          - \Phi\Big(\frac{\text{low} - \mu}{\sigma}\Big)

    Statistics are computed in float64 and returned in the parameters' dtype. The location may lie
    far outside the interval. Samples are reparameterised by the inverse of the cumulative
    distribution function, in all four parameters.

    Args:
        loc: location μ of the untruncated normal.
        scale: scale σ > 0 of the untruncated normal.
        low: lower end; may be −∞.
        high: upper end, above ``low``; may be ∞.

    Raises:
        ValueError: the bounds are not in order.
    """

    _shared: tuple[_Together, int] | None = None

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return _between(self.low, self.high)

    def split(self, sizes: Sequence[int]) -> list[TruncatedNormal]:
        """Laws of parts of the last batch axis, which are drawn and have their entropy together.

        What one of them is asked for is computed for all: some hundred operations on a few numbers
        take as long for one part as for all. A draw of a part is independent of its earlier ones.

        Args:
            sizes: of the parts; their sum is that of the axis.
        """
        together = _Together(self, tuple(sizes))
        whole = self.loc, self.scale, self.low, self.high
        parts, start = [], 0
        for index, size in enumerate(together.sizes):
            loc, scale, low, high = (value.narrow(-1, start, size) for value in whole)
            part = TruncatedNormal(loc, scale, low, high, validate_args=False)
            part._shared = together, index
            parts.append(part)
            start += size
        return parts

    @property
    def mean(self) -> Tensor:
        mode, _, mean, _ = self._moments()
        return (mode + mean).to(self.loc.dtype)

    @property
    def variance(self) -> Tensor:
        return self._moments()[3].to(self.loc.dtype)

    def entropy(self) -> Tensor:
        return self.double_entropy().to(self.loc.dtype)

    def double_entropy(self) -> Tensor:
        """The entropy in float64, for differences that float32 would lose."""
        if self._shared is not None:
            together, index = self._shared
            return together.entropies[index]
        entropy: Tensor = _fused(_Entropy, self.loc, self.scale, self.low, self.high)
        return entropy

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = value.double()
        mode, log_integral, _, _ = self._moments()
        log_prob = self._log_ratio(value, mode) - log_integral
        inside = (self.low <= value) & (value <= self.high)
        return torch.where(inside, log_prob, -math.inf).to(self.loc.dtype)

    def log_mass(self, low: Tensor | float, high: Tensor | float) -> Tensor:
        """log P(low ≤ X ≤ high), accurate in both tails; -inf where nothing overlaps."""
        loc, scale, bottom, top = (v.double() for v in (self.loc, self.scale, self.low, self.high))
        low, high = (
            torch.as_tensor(v, dtype=torch.float64, device=loc.device).clamp(bottom, top)
            for v in (low, high)
        )
        some = low < high
        # Where there is nothing, the whole stands in: the log of 0 has no gradient.
        low, high = torch.where(some, low, bottom), torch.where(some, high, top)
        mode, log_integral, _, _ = self._moments()
        part_mode, part, _, _ = _moments(loc, scale, low, high)
        log_mass = self._log_ratio(part_mode, mode) + part - log_integral
        return torch.where(some, log_mass, -math.inf).to(self.loc.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.log_mass(self.low, value).exp()

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile of each probability."""
        parameters = self.loc, self.scale, self.low, self.high, value
        sample = _Quantile.of(*torch.broadcast_tensors(*(v.double() for v in parameters)))
        bounds = self.low.detach(), self.high.detach()
        quantile: Tensor = sample.to(self.loc.dtype).clamp(*bounds)
        return quantile

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        if self._shared is not None:
            together, index = self._shared
            return together.draw(index, torch.Size(sample_shape))
        shape = self._extended_shape(sample_shape)
        return self.icdf(torch.rand(shape, dtype=torch.float64, device=self.loc.device))

    def log_exponential_moment(self, order: float) -> Tensor:
        """log E exp(order · X), in float64: the moments of exp(X) in log space."""
        # exp(order · x) times the density is again normal, about a shifted location.
        mode, log_integral, _, _ = self._moments()
        scale = self.scale.double()
        shifted = self.loc.double() + order * scale.square()
        top, tilted, _, _ = _moments(shifted, scale, self.low, self.high)
        return order * top + self._log_ratio(top, mode) + tilted - log_integral

    def _moments(self) -> tuple[Tensor, ...]:
        return _moments(self.loc, self.scale, self.low, self.high)

    def _log_ratio(self, value: Tensor, mode: Tensor) -> Tensor:
        """log p(value) - log p(mode), without the cancellation of two squares."""
        distance = (value - mode) * (value + mode - 2 * self.loc.double())
        return -distance / (2 * self.scale.double().square())


class _Together:
    """What the parts of a law have in common, see :meth:`TruncatedNormal.split`."""

    def __init__(self, whole: TruncatedNormal, sizes: tuple[int, ...]) -> None:
        self._whole, self.sizes = whole, sizes
        self._drawn: dict[tuple[torch.Size, int], Tensor] = {}

    @functools.cached_property
    def entropies(self) -> tuple[Tensor, ...]:
        return self._whole.double_entropy().split(self.sizes, -1)

    def draw(self, index: int, sample_shape: torch.Size) -> Tensor:
        """A draw of one part that nobody has had; those of the others wait for them."""
        if (sample_shape, index) not in self._drawn:
            parts = self._whole.rsample(sample_shape).split(self.sizes, -1)
            self._drawn |= {(sample_shape, number): part for number, part in enumerate(parts)}
        return self._drawn.pop((sample_shape, index))


class TruncatedLogNormal(_Truncated):
    r"""The law of :math:`\theta = e^x` for a :class:`TruncatedNormal` x.

    .. math::
        p(\theta) = p_x(\log \theta) / \theta, \qquad
        x \sim N(\mu, \sigma^2) \text{ conditioned on } [\text{low}, \text{high}]

    Moments are computed in log space and float64. Source: the multiplicative noise of Neklyudov,
    Molchanov, Ashukha and Vetrov 2017.

    Args:
        loc: location μ of log θ.
        scale: scale σ > 0 of log θ.
        low: lower end of log θ; may be −∞.
        high: upper end of log θ, above ``low``; may be ∞.

    Raises:
        ValueError: the bounds are not in order.
    """

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return _exponential(self.low, self.high)

    @functools.cached_property
    def log_distribution(self) -> TruncatedNormal:
        """The law of log θ."""
        return TruncatedNormal(self.loc, self.scale, self.low, self.high, validate_args=False)

    def split(self, sizes: Sequence[int]) -> list[TruncatedLogNormal]:
        """As :meth:`TruncatedNormal.split`."""
        parts = []
        for law in self.log_distribution.split(sizes):
            part = TruncatedLogNormal(law.loc, law.scale, law.low, law.high, validate_args=False)
            part.log_distribution = law
            parts.append(part)
        return parts

    def log_mean(self) -> Tensor:
        """log E θ, in float64."""
        return self.log_distribution.log_exponential_moment(1.0)

    def log_second_moment(self) -> Tensor:
        """log E θ², in float64."""
        return self.log_distribution.log_exponential_moment(2.0)

    @property
    def mean(self) -> Tensor:
        return self.log_mean().exp().to(self.loc.dtype)

    @property
    def variance(self) -> Tensor:
        return ((2 * self.log_mean()).exp() * self._squared_variation()).to(self.loc.dtype)

    @property
    def signal_to_noise(self) -> Tensor:
        """Mean over standard deviation."""
        return self._squared_variation().rsqrt().to(self.loc.dtype)

    def _squared_variation(self) -> Tensor:
        """Var θ / (E θ)² in float64."""
        excess = torch.expm1(self.log_second_moment() - 2 * self.log_mean())
        # Where that difference drowns in rounding, θ is constant to 1e-4 and the variance of log θ
        # equals it to as many digits.
        return torch.where(excess > 1e-9, excess, self.log_distribution._moments()[3])

    def entropy(self) -> Tensor:
        log_distribution = self.log_distribution
        return log_distribution.entropy() + log_distribution.mean

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        positive = value > 0
        logarithm = torch.where(positive, value, 1.0).double().log()
        # exp and log of a bound need not return to the bound.
        slack = 8 * torch.finfo(self.loc.dtype).eps
        inside = logarithm.clamp(self.low, self.high)
        inside = torch.where((logarithm - inside).abs() <= slack, inside, logarithm)
        log_prob = self.log_distribution.log_prob(inside) - logarithm.to(self.loc.dtype)
        return torch.where(positive, log_prob, -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.log_distribution.cdf(value.double().log())

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile of each probability."""
        return self.log_distribution.icdf(value).exp()

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.log_distribution.rsample(sample_shape).exp()


class LogUniform(TorchDistribution):
    r"""A distribution whose logarithm is uniform.

    .. math::
        p(\theta) = \frac{1}{\theta\, (\text{high} - \text{low})}, \qquad
        \text{low} \le \log \theta \le \text{high}

    Args:
        low: finite lower end of log θ.
        high: finite upper end of log θ, above ``low``.

    Raises:
        ValueError: the bounds are infinite or not in order.
    """

    arg_constraints = {
        "low": constraints.dependent(is_discrete=False, event_dim=0),
        "high": constraints.dependent(is_discrete=False, event_dim=0),
    }
    has_rsample = True

    def __init__(
        self, low: Tensor | float, high: Tensor | float, validate_args: bool | None = None
    ) -> None:
        self.low, self.high = broadcast_floating(low, high)
        super().__init__(self.low.shape, validate_args=validate_args)
        if self._validate_args:
            _check_bounds(self, finite=True)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogUniform:
        new = self._get_checked_instance(LogUniform, _instance)
        batch_shape = torch.Size(batch_shape)
        new.low, new.high = self.low.expand(batch_shape), self.high.expand(batch_shape)
        super(LogUniform, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return _exponential(self.low, self.high)

    @property
    def mean(self) -> Tensor:
        width = self.high - self.low
        return self.high.exp() * -torch.expm1(-width) / width

    @property
    def variance(self) -> Tensor:
        width = self.high - self.low
        second_moment = (2 * self.high).exp() * -torch.expm1(-2 * width) / (2 * width)
        return second_moment - self.mean.square()

    def entropy(self) -> Tensor:
        return (self.high - self.low).log() + 0.5 * (self.low + self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        positive = value > 0
        logarithm = torch.where(positive, value, 1.0).log()
        slack = 8 * torch.finfo(self.low.dtype).eps  # exp and log of a bound need not return to it
        inside = positive & (self.low - slack <= logarithm) & (logarithm <= self.high + slack)
        return torch.where(inside, -logarithm - (self.high - self.low).log(), -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return ((value.log() - self.low) / (self.high - self.low)).clamp(0, 1)

    def icdf(self, value: Tensor) -> Tensor:
        return (self.low + value * (self.high - self.low)).exp()

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return self.icdf(torch.rand(shape, dtype=self.low.dtype, device=self.low.device))


def _check_bounds(distribution: Any, finite: bool = False) -> None:
    low, high = distribution.low, distribution.high
    right = low < high
    if finite:
        right = right & low.isfinite() & high.isfinite()
    if not right.all():
        raise ValueError(
            f"{type(distribution).__name__} needs {'finite ' if finite else ''}bounds with "
            f"low < high, got low {low} and high {high}"
        )


class _Between(constraints.interval):
    """Some ends are finite and some are not, which no one bijection leads to."""


def _between(low: Tensor, high: Tensor) -> constraints.Constraint:
    """[low, high], named such that ``biject_to`` knows which ends there are."""
    below, above = low.isinf(), high.isinf()
    if not (below.any() or above.any()):
        return constraints.interval(low, high)
    if below.all() and above.all():
        return constraints.real
    if above.all() and not below.any():
        return constraints.greater_than_eq(low)
    if below.all() and not above.any():
        return constraints.less_than(torch.nextafter(high, torch.full_like(high, math.inf)))
    return _Between(low, high)


def _exponential(low: Tensor, high: Tensor) -> constraints.Constraint:
    """[exp(low), exp(high)], with room for the rounding of exp and log."""
    slack = 8 * torch.finfo(low.dtype).eps
    low, high = low.exp() * (1 - slack), high.exp() * (1 + slack)
    return constraints.positive if not low.any() and high.isinf().all() else _between(low, high)


@functools.lru_cache
def _legendre(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and weights of the Gauss-Legendre rule."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    rule = torch.from_numpy(np.stack([nodes + 1, weights]) / 2)
    return tuple(rule.to(device).unbind())  # type: ignore[return-value]


class _Rule(NamedTuple):
    """A normal density on an interval, relative to its mode c there; with r = x - c.

    distance:     c - loc
    log_integral: of p(x) / p(c)
    mean:         of r
    second:       central moments of r, like the third and the fourth
    """

    mode: Tensor
    distance: Tensor
    log_integral: Tensor
    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor


def _rule(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> _Rule:
    """By quadrature: one node holds exp(-r (r + 2 (c - loc)) / (2 scale²))."""
    # The rule holds for any point c and cut, which therefore have no gradient.
    mode = loc.detach().clamp(low.detach(), high.detach())
    distance = mode - loc
    slope = distance.detach().abs() / scale.detach()
    # Root v of v²/2 + slope · v = _DROP: the standardised distance over which p falls by that.
    reach = scale.detach() * (2 * _DROP) / ((slope.square() + 2 * _DROP).sqrt() + slope)
    left, right = torch.minimum(mode - low, reach), torch.minimum(high - mode, reach)
    span = left + right
    # Nodes are the first axis: sums over them then run along memory.
    nodes, weights = (part.reshape(-1, *[1] * loc.dim()) for part in _legendre(loc.device))
    offset = torch.addcmul(-left, span, nodes)
    mass = weights * ((offset + 2 * distance) * offset * (-0.5 / scale.square())).exp()
    total = mass.sum(0)
    log_integral = (span * total).log()
    mean = (mass * offset).sum(0) / total
    centred = offset - mean
    powers = mass * centred  # whose sum is 0
    moments = []
    for _ in range(3):
        powers = powers * centred
        moments.append(powers.sum(0) / total)
    return _Rule(mode, distance, log_integral, mean, *moments)


class _Moments(Fused):
    """The mode, log integral, mean and variance of a rule.

    Differentiating a node in loc and scale multiplies it by r / scale² and
    r (r + 2 (c - loc)) / scale³, so that all derivatives are central moments up to the fourth.
    """

    @staticmethod
    def plain(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        rule = _rule(loc, scale, low, high)
        return rule.mode, rule.log_integral, rule.mean, rule.second

    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, ...]:
        mode, distance, log_integral, mean, second, third, fourth = _rule(loc, scale, low, high)
        ctx.save_for_backward(loc, scale, low, high, distance, mean, second, third, fourth)
        ctx.constants = ()
        ctx.mark_non_differentiable(mode)
        return mode, log_integral, mean, second

    @staticmethod
    def slope(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, scale, _, _, distance, mean, second, third, fourth = ctx.saved_tensors
        _, by_integral, by_mean, by_variance = gradients
        from_loc = 2 * (mean + distance)
        energy = second + mean * (mean + 2 * distance)
        loc = by_integral * mean + by_mean * second + by_variance * third
        of_scale = (
            by_integral * energy
            + by_mean * (third + from_loc * second)
            + by_variance * (fourth - second.square() + from_loc * third)
        )
        return loc / scale.square(), of_scale / scale.pow(3), None, None


class _Entropy(Fused):
    """The entropy, log integral + E e / (2 scale²) with e = r (r + 2 (c - loc)).

    Its derivatives are covariances with the scores: Cov(e, r) / (2 scale⁴) in loc and
    Var(e) / (2 scale⁵) in scale. With k = mean + c - loc and central moments, they are
    Cov(e, r) = third + 2 k second and Var(e) = fourth - second² + 4 k (third + k second).
    """

    @staticmethod
    def plain(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        rule = _rule(loc, scale, low, high)
        energy = rule.second + rule.mean * (rule.mean + 2 * rule.distance)
        return rule.log_integral + 0.5 * energy / scale.square()

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        _, distance, log_integral, mean, second, third, fourth = _rule(loc, scale, low, high)
        half_precision = 0.5 / scale.square()
        from_loc = mean + distance
        energy = torch.addcmul(second, from_loc + distance, mean)
        ctx.save_for_backward(
            loc, scale, low, high, half_precision, from_loc, second, third, fourth
        )
        ctx.constants = ()
        return log_integral.addcmul_(energy, half_precision)

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, scale, _, _, half_precision, from_loc, second, third, fourth = ctx.saved_tensors
        moved = from_loc * second
        covariance = torch.add(third, moved, alpha=2)
        moved.add_(third).mul_(from_loc)
        variance = torch.add(fourth, moved, alpha=4).addcmul_(second, second, value=-1)
        factor = half_precision.square().mul_(gradient).mul_(2)
        return covariance.mul_(factor), variance.mul_(factor).div_(scale), None, None


def _moments(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    return _fused(_Moments, loc, scale, low, high)


def _fused(function: type[Fused], *parameters: Tensor) -> Any:
    """In float64; written-out derivatives are those in loc and scale only."""
    loc, scale, low, high = torch.broadcast_tensors(*(value.double() for value in parameters))
    bounds = torch.is_grad_enabled() and (low.requires_grad or high.requires_grad)
    return (function.plain if bounds else function.of)(loc, scale, low, high)


class _Quantile(Fused):
    """x with P(X ≤ x) = p. Its derivatives are those of the implicit function."""

    @staticmethod
    def plain(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, probability: Tensor) -> Tensor:
        # Newton's steps from the root itself: each doubles the order that derivatives are right to.
        root = (value.detach() for value in (loc, scale, low, high, probability))
        value, *_ = _truncated_quantile(*root)
        law = TruncatedNormal(loc, scale, low, high, validate_args=False)
        lower_half = probability < 0.5
        p = torch.where(lower_half, probability, 1 - probability)
        for _ in range(2):
            below, above = law.log_mass(low, value), law.log_mass(value, high)
            log_tail = torch.where(lower_half, below, above)
            rate = (law.log_prob(value) - log_tail).exp()
            gap = torch.where(lower_half, log_tail - p.log(), p.log() - log_tail)
            value = value - (gap - gap.detach()) / rate
        return value

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        value, *derivatives = _truncated_quantile(*arguments)
        ctx.save_for_backward(*arguments, value, *derivatives)
        ctx.constants = ()
        return value

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        loc, scale, low, high, _, value, *derivatives = ctx.saved_tensors
        if ctx.needs_input_grad[4]:
            law = TruncatedNormal(loc, scale, low, high, validate_args=False)
            derivatives.append((-law.log_prob(value)).exp())
        else:
            derivatives.append(value)  # which nobody looks at
        return tuple(
            gradient * derivative if wanted else None
            for derivative, wanted in zip(derivatives, ctx.needs_input_grad, strict=True)
        )


def _truncated_quantile(
    loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, probability: Tensor
) -> tuple[Tensor, ...]:
    """Quantiles of a truncated normal, and their derivatives in loc, scale, low and high.

    With t = (x - loc) / scale in [a, b] and Φ(t) = (1 - p) Φ(a) + p Φ(b), the derivatives follow
    from dt/da = (1 - p) φ(a)/φ(t) =: A and dt/db = p φ(b)/φ(t) =: B:
    dx/dloc = 1 - A - B, dx/dscale = t - a A - b B, and A and B are those in the ends.
    """
    # Mirrored where the upper tail is nearer, so that Φ is only evaluated where it is precise.
    mirrored = low + high > 2 * loc
    signed = torch.where(mirrored, -scale, scale)
    far, near = torch.where(mirrored, high, low), torch.where(mirrored, low, high)
    # An infinite end is one so far away that squares still have a number.
    a, b = ((end - loc) / signed for end in (far, near))
    a, b = a.clamp(min=-_FAR), b.clamp(max=_FAR)
    epsilon = torch.finfo(probability.dtype).eps / 2
    p = torch.where(mirrored, 1 - probability, probability).clamp(epsilon, 1 - epsilon)
    q = 1 - p

    below = torch.special.ndtr(a)
    t = torch.special.ndtri(below + p * (torch.special.ndtr(b) - below)).clamp(a, b)
    width = b - a
    distance = b - t
    sample = torch.addcmul(loc, signed, t)
    in_tail = b < -_TAIL
    # Asking costs more than computing it for a few, and a step that asks cannot be recorded.
    if in_tail.numel() <= _FEW or is_transformed() or in_tail.any():
        # Here t would round to b, or to infinity: the distance from b is what is known.
        beyond = _tail_distance(-b.clamp(max=-_TAIL), width, q)
        beyond = torch.minimum(beyond.clamp(min=0), width)
        t, distance = torch.where(in_tail, b - beyond, t), torch.where(in_tail, beyond, distance)
        sample = torch.where(in_tail, torch.addcmul(near, signed, beyond, value=-1), sample)

    to_low = width - distance
    by_a = q * ((a + 0.5 * to_low) * to_low).exp()
    by_b = p * ((0.5 * distance - b) * distance).exp()
    by_loc = 1 - by_a - by_b
    by_scale = t * by_loc + to_low * by_a - distance * by_b
    by_scale = torch.where(mirrored, -by_scale, by_scale)
    by_low, by_high = torch.where(mirrored, by_b, by_a), torch.where(mirrored, by_a, by_b)
    return sample, by_loc, by_scale, by_low, by_high


def _tail_distance(h: Tensor, width: Tensor, q: Tensor) -> Tensor:
    """Distance v = b - t of a quantile t in [a, b] for b = -h ≤ -5, by Newton on the log tail.

    The log ratio of the tails beyond h + v and h is
    -v (h + v/2) + log(erfcx((h + v)/√2) / erfcx(h/√2)); it is convex and nearly linear, and
    Newton's method is at rounding error after three steps.

    Args:
        h: how far the near end of the interval is from the location, standardised.
        width: of the interval.
        q: how probable it is to lie beyond the quantile, towards b.
    """
    root = math.sqrt(0.5)
    at_h = torch.special.erfcx(h * root)

    def beyond(v: Tensor) -> Tensor:
        return torch.special.erfcx((h + v) * root)

    def exponent(v: Tensor) -> Tensor:
        return (h + 0.5 * v) * v

    ratio = (beyond(width) / at_h).log() - exponent(width)
    target = -torch.log1p(q * torch.expm1(ratio))
    v = 2 * target / (h + (h.square() + 2 * target).sqrt())
    target = target - at_h.log()
    for _ in range(3):
        tail = beyond(v)
        v = v + _SLOPE * (tail.log() + target - exponent(v)) * tail
    return v
