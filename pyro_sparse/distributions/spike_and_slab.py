"""Spike-and-slab distributions: a whole event is either exactly zero or a draw from the slab.

Inclusion lives in logits throughout: log(γ) and log(1 - γ) come from logsigmoid, so that saturated
probabilities neither overflow nor lose their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Independent, MaskedDistribution, TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Distribution, constraints, transform_to
from torch.distributions.utils import lazy_property
from torch.nn.functional import logsigmoid

from pyro_sparse.distributions.analytic import straight_through
from pyro_sparse.distributions.log_scale_normal import LogScaleNormal
from pyro_sparse.distributions.tied_normal import TiedNormal

__all__ = ["RelaxedSpikeAndSlab", "SpikeAndSlab", "TrapeziumSpikeAndSlab"]


class _ZeroOr(constraints.Constraint):
    """Events that are zero in every entry, or satisfy ``base``.

    There is deliberately no bijection to this constraint: a continuous guide has no density with
    respect to the spike.
    """

    def __init__(self, base: constraints.Constraint) -> None:
        self.base = base
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self.base.event_dim

    def check(self, value: Tensor) -> Tensor:
        return _is_zero(value, self.event_dim) | self.base.check(value)

    def __repr__(self) -> str:
        return f"ZeroOr({self.base!r})"


class _MixedGradient:
    """Keeps :meth:`score_parts` alive through ``to_event`` and ``mask``.

    Pyro's Independent assumes that a distribution with ``has_rsample`` needs no score term.
    """

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        ndims = (
            len(self.batch_shape)  # type: ignore[attr-defined]
            if reinterpreted_batch_ndims is None
            else reinterpreted_batch_ndims
        )
        base: Any = self
        if isinstance(self, _Independent):
            base, ndims = self.base_dist, ndims + self.reinterpreted_batch_ndims
        if ndims < 0:
            raise ValueError(f"cannot remove {-ndims} event dimensions that belong to {base!r}")
        return _Independent(base, ndims) if ndims else base

    def mask(self, mask: bool | Tensor) -> Any:
        return _Masked(self, mask)


class _Independent(_MixedGradient, Independent):  # type: ignore[override]
    def score_parts(self, value: Tensor) -> ScoreParts:
        parts = self.base_dist.score_parts(value)
        return ScoreParts(
            *(
                sum_rightmost(part, self.reinterpreted_batch_ndims)
                if isinstance(part, Tensor)
                else part
                for part in parts
            )
        )


class _Masked(_MixedGradient, MaskedDistribution):
    pass


class SpikeAndSlab(_MixedGradient, TorchDistribution):
    r"""Law of :math:`z w` with :math:`z \sim \mathrm{Bernoulli}(\gamma)`, :math:`w \sim` slab.

    With respect to :math:`\delta_0` + Lebesgue measure on the *whole event* its density is

    .. math::
        p(x) = \begin{cases} 1 - \gamma & x = 0 \text{ in every entry} \\
                             \gamma\, p_\text{slab}(x) & \text{otherwise.} \end{cases}

    Samples are hard. Where the slab is reparameterised so is the sample, in the slab's parameters;
    the gradient in :math:`\gamma` is left to the score term, :math:`\log P(z)`, that
    :meth:`score_parts` hands to ``Trace_ELBO``: the mixed estimator is unbiased. Closed-form
    ``kl_divergence`` between two of these is in :mod:`pyro_sparse.distributions.kl`.

    :param probs: inclusion probability γ, in [0, 1], shape broadcastable to the slab's batch shape.
    :param slab: distribution of an included event; any event shape, continuous.
    :param logits: log-odds of inclusion; exactly one of ``probs`` and ``logits`` is given.
    :raises ValueError: for both or neither of ``probs`` and ``logits``, a slab that is no
        continuous distribution, or shapes that do not broadcast.

    Example::

        beta = pyro.sample("beta", SpikeAndSlab(0.1, Normal(0, 1).expand([20, 5]).to_event(1)))
    """

    arg_constraints = {"probs": constraints.unit_interval, "logits": constraints.real}

    def __init__(
        self,
        probs: Tensor | float | None = None,
        slab: Distribution | None = None,
        logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        name = type(self).__name__
        if not isinstance(slab, Distribution) or slab.support.is_discrete:  # type: ignore[union-attr]
            raise ValueError(f"{name} needs a continuous distribution as slab, got {slab!r}")
        if (probs is None) == (logits is None):
            given = "neither" if probs is None else "both"
            raise ValueError(f"{name} needs exactly one of probs and logits, got {given}")
        like = _like(slab)
        if probs is not None:
            self.probs = torch.as_tensor(probs, **like)
            logits = torch.logit(self.probs)
        logits = torch.as_tensor(logits, **like)
        try:
            batch_shape = slab.batch_shape
            if logits.shape != batch_shape:
                batch_shape = torch.broadcast_shapes(logits.shape, batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"{name}: inclusion of shape {tuple(logits.shape)} does not broadcast with the "
                f"slab's batch shape {tuple(slab.batch_shape)} (event shape "
                f"{tuple(slab.event_shape)}); turn the entries of a group into an event with "
                "slab.to_event(1)"
            ) from error
        self.logits = logits if logits.shape == batch_shape else logits.expand(batch_shape)
        if probs is not None:
            self.probs = self.probs.expand(batch_shape)
        self.slab = slab if slab.batch_shape == batch_shape else slab.expand(batch_shape)
        super().__init__(batch_shape, slab.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SpikeAndSlab:
        new = self._get_checked_instance(SpikeAndSlab, _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(batch_shape)
        if "probs" in self.__dict__:
            new.probs = self.probs.expand(batch_shape)
        new.slab = self.slab.expand(batch_shape)
        super(SpikeAndSlab, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def probs(self) -> Tensor:
        return torch.sigmoid(self.logits)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.slab.has_rsample

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return _ZeroOr(self.slab.support)  # type: ignore[arg-type]

    @property
    def mean(self) -> Tensor:
        return self._per_event(self.probs) * self.slab.mean

    @property
    def variance(self) -> Tensor:
        # γ(v + μ²) - γ²μ², without the cancellation.
        inclusion = self._per_event(self.probs)
        exclusion = self._per_event(torch.sigmoid(-self.logits))
        return inclusion * (self.slab.variance + exclusion * self.slab.mean.square())

    def rsample_inclusion(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws the inclusion z alone, without a gradient; shape ``sample_shape + batch_shape``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return torch.bernoulli(self.probs.detach().expand(shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        included = self._per_event(self.rsample_inclusion(sample_shape)) > 0
        draw = self.slab.rsample if self.has_rsample else self.slab.sample
        value = draw(torch.Size(sample_shape))
        # Not a product: an infinite draw of a heavy-tailed slab times zero would be NaN.
        return torch.where(included, value, torch.zeros_like(value))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        excluded = _is_zero(value, self.event_dim)
        # The slab is evaluated inside its support also in excluded rows: else the gradient of the
        # branch that is not taken would be NaN, and where() would pass it on.
        inside = torch.where(self._per_event(excluded), self._feasible(), value)
        return torch.where(
            excluded, logsigmoid(-self.logits), logsigmoid(self.logits) + self.slab.log_prob(inside)
        )

    def score_parts(self, value: Tensor) -> ScoreParts:
        if not self.has_rsample:
            return super().score_parts(value)
        log_prob = self.log_prob(value)
        excluded = _is_zero(value, self.event_dim)
        score = torch.where(excluded, logsigmoid(-self.logits), logsigmoid(self.logits))
        return ScoreParts(log_prob=log_prob, score_function=score, entropy_term=log_prob)

    def _per_event(self, value: Tensor) -> Tensor:
        """Appends the event's dimensions to a value with one entry per event."""
        return value.reshape(value.shape + (1,) * self.event_dim)

    def _feasible(self) -> Tensor:
        """A constant inside the slab's support: its mean, or 'zero' where that is not finite."""
        shape = self.slab.batch_shape + self.slab.event_shape
        zero = torch.zeros(shape, **_like(self.slab))
        point = transform_to(self.slab.support)(zero).detach()
        try:
            mean = self.slab.mean.detach()
        except NotImplementedError:
            return point
        return torch.where(mean.isfinite(), mean, point)


class RelaxedSpikeAndSlab(SpikeAndSlab):
    r"""The law of :class:`SpikeAndSlab`, with samples that also have a gradient in the inclusion.

    Only the sample differs: with a logistic ε and temperature t

    .. math::
        s = \mathrm{sigmoid}((\mathrm{logit}\,\gamma + \varepsilon) / t), \qquad
        z = 1[s > 1/2] \text{ forward, } s \text{ backward},

    so that P(z = 1) = γ exactly while the gradient is that of the concrete distribution: biased,
    with low variance. ``straight_through=False`` uses the soft s forward, too.
    ``log_prob``, ``mean``, ``variance`` and the KL are those of the exact law, and there is no
    score term. A soft sample is never exactly zero: use it with a closed-form KL only (as in
    ``TraceMeanField_ELBO``), not with a sampled one.

    Source: Maddison et al. 2017, Jang et al. 2017 (binary concrete, straight-through).

    :param temperature: positive, broadcastable to the batch shape.
    :param probs: see :class:`SpikeAndSlab`.
    :param slab: reparameterised distribution of an included event.
    :param logits: see :class:`SpikeAndSlab`.
    :param straight_through: hard forward and soft backward (True), or soft both ways.
    :raises ValueError: as :class:`SpikeAndSlab`, and for a slab without ``rsample``.
    """

    arg_constraints = {**SpikeAndSlab.arg_constraints, "temperature": constraints.positive}

    def __init__(
        self,
        temperature: Tensor | float,
        probs: Tensor | float | None = None,
        slab: Distribution | None = None,
        logits: Tensor | float | None = None,
        straight_through: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(slab, Distribution):
            if not slab.has_rsample:
                raise ValueError(
                    f"RelaxedSpikeAndSlab needs a slab with rsample, got {slab!r}; "
                    "use SpikeAndSlab, whose gradient is a score function"
                )
            temperature = torch.as_tensor(temperature, **_like(slab))
        self.temperature: Any = temperature
        self.straight_through = straight_through
        super().__init__(probs, slab, logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RelaxedSpikeAndSlab:
        new = self._get_checked_instance(RelaxedSpikeAndSlab, _instance)
        new.temperature = self.temperature
        new.straight_through = self.straight_through
        return super().expand(batch_shape, _instance=new)

    def rsample_inclusion(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws z alone, with a gradient in the logits; shape ``sample_shape + batch_shape``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        noise = torch.logit(uniform, torch.finfo(uniform.dtype).eps)
        logits = self.logits.expand(shape)
        return straight_through(logits, noise, self.temperature, self.straight_through)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        inclusion, shape = self.rsample_inclusion(sample_shape), torch.Size(sample_shape)
        slab: Any = self.slab
        rows = slab.base_dist if isinstance(slab, Independent) else slab
        if self.event_dim == 1 and isinstance(rows, LogScaleNormal | TiedNormal):
            return rows.rsample(shape, inclusion)
        return self._per_event(inclusion) * slab.rsample(shape)

    def score_parts(self, value: Tensor) -> ScoreParts:
        # The part of a fully reparameterised distribution, whatever z was made of.
        log_prob = self.log_prob(value)
        none: Any = 0
        return ScoreParts(log_prob=log_prob, score_function=none, entropy_term=log_prob)


class TrapeziumSpikeAndSlab(RelaxedSpikeAndSlab):
    r"""The law of :class:`SpikeAndSlab`, with a gradient in the inclusion by the trapezium rule.

    Draws are exact. With f what is averaged, the gradient is

    .. math::
        \frac{∂}{∂\,\text{logit}\,γ} E f = γ(1 − γ)\,(f(1) − f(0)) ≈
        γ(1 − γ)\,\frac{f'(0) + f'(1)}{2},

    of which a draw z gives one side, divided by the probability of z: f' times half the
    probability of the other value. That is *unbiased* wherever f is quadratic in each inclusion
    given the others, as the log-likelihood of a linear network with normal errors is, and right to
    second order elsewhere; it needs one evaluation, no temperature and no noise but z. (The
    straight-through estimator weighs the two sides by temperature and γ, and wrongly.)

    Source: Liu, Dong, Liu, Yu, Gao, NeurIPS 2023 (ReinMax), for two categories.

    :param probs, slab, logits: see :class:`SpikeAndSlab`; the slab has ``rsample``.
    """

    arg_constraints = SpikeAndSlab.arg_constraints

    def __init__(
        self,
        probs: Tensor | float | None = None,
        slab: Distribution | None = None,
        logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        # The temperature of a relaxation, of which there is none.
        super().__init__(1.0, probs, slab, logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TrapeziumSpikeAndSlab:
        new = self._get_checked_instance(TrapeziumSpikeAndSlab, _instance)
        expanded: TrapeziumSpikeAndSlab = super().expand(batch_shape, _instance=new)
        return expanded

    def rsample_inclusion(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws z alone, with its gradient; shape ``sample_shape + batch_shape``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        logits = self.logits.expand(shape)
        probability = logits.detach().sigmoid()
        inclusion = torch.bernoulli(probability)
        other = torch.where(inclusion > 0, 1 - probability, probability)
        return inclusion + 0.5 * other * (logits - logits.detach())


def _is_zero(value: Tensor, event_dim: int) -> Tensor:
    zero = value == 0
    return zero.flatten(-event_dim).all(-1) if event_dim else zero


def _like(distribution: Distribution) -> dict[str, Any]:
    """dtype and device of a distribution's parameters, so that plain numbers can follow them."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    for value in vars(distribution).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return {"dtype": value.dtype, "device": value.device}
    return {"dtype": torch.get_default_dtype()}
