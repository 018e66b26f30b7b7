"""Spike-and-slab distributions: a whole event is either exactly zero or a draw from the slab.

Inclusion lives in logits throughout: log(γ) and log(1 - γ) come from logsigmoid, so that saturated
probabilities neither overflow nor lose their gradient.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from pyro.distributions import Independent, MaskedDistribution, TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import (
    Distribution,
    TransformedDistribution,
    biject_to,
    constraints,
    transform_to,
)
from torch.distributions.utils import lazy_property
from torch.nn.functional import logsigmoid

from pyro_sparse.distributions.analytic import straight_through
from pyro_sparse.distributions.log_scale_normal import LogScaleNormal
from pyro_sparse.distributions.tied_normal import TiedNormal

__all__ = ["RelaxedSpikeAndSlab", "SpikeAndSlab", "TrapeziumSpikeAndSlab"]


class _ZeroOr(constraints.Constraint):
    """Events that are zero in every entry, or satisfy ``base``.

    No bijection leads to it: a continuous guide or chain has no density with respect to the spike.
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


@biject_to.register(_ZeroOr)
@transform_to.register(_ZeroOr)
def _no_bijection(constraint: _ZeroOr) -> Any:
    raise NotImplementedError(
        "a law with an atom at zero is no image of a real space, which automatic guides and "
        "gradient-based chains need: give it a guide of its own with SpikeAndSlab or "
        "RelaxedSpikeAndSlab and leave it out of the automatic one (pyro.poutine.block), or use a "
        "continuous shrinkage prior"
    )


class _MixedGradient:
    """Keeps draws and score term of a law together through ``to_event`` and ``mask``.

    ``has_rsample`` is False where a draw carries less than the whole gradient, so that whatever
    only looks at that draws without a gradient and takes the whole log-density as score: unbiased,
    with more variance. What calls the law and asks for its `score_parts` gets the better estimator.
    """

    def __call__(self, sample_shape: Any = torch.Size()) -> Tensor:
        draw: Tensor = self.rsample(torch.Size(sample_shape))  # type: ignore[attr-defined]
        return draw

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
    def score_parts(self, value: Tensor) -> ScoreParts:
        # A draw that is masked here may still move what comes after it: its score stays whole.
        return self.base_dist.score_parts(value).scale_and_mask(mask=self._mask)


class SpikeAndSlab(_MixedGradient, TorchDistribution):
    r"""Law of :math:`z w` with :math:`z \sim \mathrm{Bernoulli}(\gamma)`, :math:`w \sim` slab.

    With respect to :math:`\delta_0` + Lebesgue measure on the *whole event* its density is

    .. math::
        p(x) = \begin{cases} 1 - \gamma & x = 0 \text{ in every entry} \\
                             \gamma\, p_\text{slab}(x) & \text{otherwise.} \end{cases}

    Samples are hard. Where the slab is reparameterised so is the sample, in the slab's parameters;
    the gradient in :math:`\gamma` is left to the score term, :math:`\log P(z)`, that
    :meth:`score_parts` hands to ``Trace_ELBO``: the mixed estimator is unbiased. The KL between two
    of these is in :mod:`pyro_sparse.distributions.kl`: that of the inclusions in closed form, and
    γ times the slabs', closed or by a draw.

    Args:
        probs: inclusion probability γ, in [0, 1], broadcastable to the slab's batch shape.
        slab: distribution of an included event; any event shape, continuous.
        logits: log-odds of inclusion; exactly one of ``probs`` and ``logits`` is given.

    Raises:
        ValueError: both or neither of ``probs`` and ``logits``, a slab that is no continuous
            distribution, or shapes that do not broadcast.

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
        self._reparameterised = self.slab.has_rsample
        super().__init__(batch_shape, slab.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SpikeAndSlab:
        new = self._get_checked_instance(SpikeAndSlab, _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(batch_shape)
        if "probs" in self.__dict__:
            new.probs = self.probs.expand(batch_shape)
        new.slab = self.slab.expand(batch_shape)
        new._reparameterised = self._reparameterised
        super(SpikeAndSlab, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def probs(self) -> Tensor:
        return torch.sigmoid(self.logits)

    @property
    def has_rsample(self) -> bool:
        """Whether a draw carries the whole gradient: that in the inclusion it cannot."""
        return self._reparameterised and not self.logits.requires_grad

    @has_rsample.setter
    def has_rsample(self, value: bool) -> None:
        if value and not self.has_rsample:
            raise ValueError(
                f"{type(self).__name__}: draws cannot be made reparameterised in the inclusion; "
                "use RelaxedSpikeAndSlab, with a KL instead of a density"
            )
        self._reparameterised = value

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
        draw = self.slab.rsample if self._reparameterised else self.slab.sample
        value = draw(torch.Size(sample_shape))
        # Not a product: an infinite draw of a heavy-tailed slab times zero would be NaN.
        return torch.where(included, value, torch.zeros_like(value))

    def log_prob(self, value: Tensor) -> Tensor:
        _refuse_jacobian()
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
        # A value without a gradient was drawn by somebody who looked at has_rsample.
        if self.has_rsample or not (self._reparameterised and value.requires_grad):
            return super().score_parts(value)
        log_prob = self.log_prob(value)
        excluded = _is_zero(value, self.event_dim)
        score = torch.where(excluded, logsigmoid(-self.logits), logsigmoid(self.logits))
        return ScoreParts(log_prob=log_prob, score_function=score, entropy_term=log_prob)

    def _per_event(self, value: Tensor) -> Tensor:
        """Appends the event's dimensions to a value with one entry per event."""
        return value.reshape(value.shape + (1,) * self.event_dim)

    def _feasible(self) -> Tensor:
        """A constant inside the slab's support: its mean, or 'zero', or else a draw."""
        shape = self.slab.batch_shape + self.slab.event_shape
        mean = None
        with contextlib.suppress(NotImplementedError):
            mean = self.slab.mean.detach()
        try:
            zero = torch.zeros(shape, **_like(self.slab))
            point = transform_to(self.slab.support)(zero).detach()
        except NotImplementedError:  # as of mixtures, whose support is nowhere registered
            point = self.slab.sample() if mean is None else mean
        return point if mean is None else torch.where(mean.isfinite(), mean, point)


class RelaxedSpikeAndSlab(SpikeAndSlab):
    r"""The law of :class:`SpikeAndSlab`, with samples that also have a gradient in the inclusion.

    Only the sample differs: with a logistic ε and temperature t

    .. math::
        s = \mathrm{sigmoid}((\mathrm{logit}\,\gamma + \varepsilon) / t), \qquad
        z = 1[s > 1/2] \text{ forward, } s \text{ backward},

    so that P(z = 1) = γ exactly while the gradient is that of the concrete distribution: biased,
    with low variance. ``straight_through=False`` uses the soft s forward, too.
    ``log_prob``, ``mean``, ``variance`` and the KL are those of the exact law, and there is no
    score term. The draws with their gradient have no density: use them where the KL is all that is
    asked for, as in ``TraceMeanField_ELBO``. A loss that takes the gradient of a draw's log-density
    raises in its first backward pass. Without a gradient to be had (``torch.no_grad``, ``sample``)
    draws are those of the exact law.

    Source: Maddison et al. 2017, Jang et al. 2017 (binary concrete, straight-through).

    Args:
        temperature: positive, broadcastable to the batch shape.
        probs: see :class:`SpikeAndSlab`.
        slab: reparameterised distribution of an included event.
        logits: see :class:`SpikeAndSlab`.
        straight_through: hard forward and soft backward (True), or soft both ways.

    Raises:
        ValueError: as :class:`SpikeAndSlab`, and a slab without ``rsample``.
    """

    arg_constraints = {**SpikeAndSlab.arg_constraints, "temperature": constraints.positive}
    has_rsample = True

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
        # Where nobody asks for a gradient there is no reason not to draw from the law itself.
        hard = self.straight_through or not torch.is_grad_enabled()
        return straight_through(logits, noise, self.temperature, hard)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        inclusion, shape = self.rsample_inclusion(sample_shape), torch.Size(sample_shape)
        slab: Any = self.slab
        rows = slab.base_dist if isinstance(slab, Independent) else slab
        if self.event_dim == 1 and isinstance(rows, LogScaleNormal | TiedNormal):
            return rows.rsample(shape, inclusion)
        return self._per_event(inclusion) * slab.rsample(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = super().log_prob(value)
        if log_prob.requires_grad and (value.requires_grad or not self.straight_through):
            if torch._C._get_tracing_state() is not None:
                raise RuntimeError(_NO_DENSITY)
            log_prob.register_hook(_refuse_gradient)
        return log_prob

    score_parts = TorchDistribution.score_parts  # type: ignore[assignment]


_NO_DENSITY = (
    "the draws of a RelaxedSpikeAndSlab have no density, so this estimator's gradient would be "
    "wrong: use TraceMeanField_ELBO or pyro_sparse.infer.ELBO with a SpikeAndSlab as prior, which "
    "need their KL only, or SpikeAndSlab in the guide"
)


def _refuse_gradient(gradient: Tensor) -> None:
    """Where a relaxed draw's log-density enters a loss; evaluating it alone is no harm."""
    raise RuntimeError(_NO_DENSITY)


_TRANSFORMED = TransformedDistribution.log_prob.__code__


def _refuse_jacobian() -> None:
    """A transform's Jacobian would multiply the probability of the atom, too.

    A TransformedDistribution asks its base for nothing that would tell it from any other caller, so
    that one has to look who calls.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "log_prob":
        if frame.f_code is _TRANSFORMED and frame.f_locals["self"].transforms:
            raise NotImplementedError(
                "a TransformedDistribution would multiply the atom of a SpikeAndSlab by its "
                "Jacobian: transform the slab, SpikeAndSlab(probs, TransformedDistribution(slab, "
                "transforms)), or the draw in the model"
            )
        frame = frame.f_back  # type: ignore[assignment]


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

    Args:
        probs: see :class:`SpikeAndSlab`.
        slab: reparameterised distribution of an included event.
        logits: see :class:`SpikeAndSlab`.
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
    inner = []
    for value in vars(distribution).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return {"dtype": value.dtype, "device": value.device}
        if isinstance(value, Distribution):
            inner.append(value)
    found = [like for like in map(_like, inner) if "device" in like]
    return found[-1] if found else {"dtype": torch.get_default_dtype()}
