r"""Closed-form Kullback-Leibler divergences, registered with ``torch.distributions.kl_divergence``.

Importing :mod:`pyro_sparse.distributions` registers them; ``TraceMeanField_ELBO`` then finds them.
None replaces what torch or Pyro have. All are exact but that from :class:`NormalJeffreys`, and
written such that saturated probabilities and tiny scales keep their gradients. Where the
slabs of two spike-and-slabs have no closed KL, that of the slabs is estimated by a draw: the
inclusion's part stays exact, and all of it unbiased.
"""

from __future__ import annotations

import math
import operator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pyro.distributions import Delta, MaskedDistribution, MaskedMixture
from pyro.distributions.inverse_gamma import InverseGamma as PyroInverseGamma
from torch import Tensor
from torch.distributions import (
    Distribution,
    Gamma,
    Independent,
    InverseGamma,
    LogNormal,
    MixtureSameFamily,
    Normal,
    Uniform,
    kl_divergence,
    register_kl,
)
from torch.distributions.kl import _kl_normal_normal as _kl_any_normals
from torch.nn.functional import softplus

from pyro_sparse.distributions.analytic import (
    factorised_rows_kl,
    gate,
    is_transformed,
    log_normal_gamma_kl,
    normal_kl,
    spike_and_slab_kl,
    square_norms,
    tied_rows_kl,
)
from pyro_sparse.distributions.gated_columns import GatedColumns
from pyro_sparse.distributions.half_cauchy import HalfCauchyFactors
from pyro_sparse.distributions.joint_normal import JointNormal
from pyro_sparse.distributions.log_scale_normal import LogScaleNormal
from pyro_sparse.distributions.markov_chain import MarkovChain
from pyro_sparse.distributions.normal_jeffreys import NormalJeffreys
from pyro_sparse.distributions.spike_and_slab import SpikeAndSlab
from pyro_sparse.distributions.tied_normal import TiedNormal
from pyro_sparse.distributions.truncated import LogUniform, TruncatedLogNormal, TruncatedNormal


def base_law(law: Any) -> Any:
    """``law`` without its masks and reinterpreted dimensions."""
    while isinstance(law, Independent | MaskedDistribution):
        law = law.base_dist
    return law


def innermost_law(law: Any) -> Any:
    """``law`` without anything around it: masks, reinterpreted dimensions, transforms."""
    while hasattr(law, "base_dist"):
        law = law.base_dist
    return law


@register_kl(SpikeAndSlab, SpikeAndSlab)
def _kl_spike_and_slab(p: SpikeAndSlab, q: SpikeAndSlab) -> Tensor:
    r"""KL(Bernoulli(γ) ‖ Bernoulli(λ)) + γ KL(slab ‖ slab): an excluded event pays for no slab."""
    if p.event_shape != q.event_shape:
        raise ValueError(
            "KL between spike-and-slabs of different groups: event shape "
            f"{tuple(p.event_shape)} against {tuple(q.event_shape)}"
        )
    slab = _kl_slabs(p.slab, q.slab).expand(p.logits.shape)
    return spike_and_slab_kl(p.logits, q.logits.expand(p.logits.shape), slab)


@register_kl(SpikeAndSlab, Distribution)
def _kl_from_continuous(p: SpikeAndSlab, q: Distribution) -> Tensor:
    """Infinite; estimated by densities at a draw it would be a number without a meaning."""
    q = innermost_law(q)
    library = type(q).__module__.split(".")[0]
    if library not in ("torch", "pyro") or isinstance(q, _PERHAPS_WITH_ATOMS):
        raise NotImplementedError(f"KL of {p!r} from {q!r}")
    raise ValueError(
        f"KL of a {type(p).__name__} from a {type(q).__name__}, which gives zero no probability, "
        "is infinite: the model needs the same atom, SpikeAndSlab(probs, slab)"
    )


@register_kl(LogScaleNormal, Normal)
def _kl_log_scale_normal_normal(p: LogScaleNormal, q: Normal) -> Tensor:
    prior_scale = _centred_scale(q)
    if prior_scale is not None and p.batch_shape == q.batch_shape:
        return normal_kl(p.loc, _log_scale(p), prior_scale)
    return _kl_any_normals(p, q)


@register_kl(TiedNormal, Independent)
def _kl_tied_normal_independent_normal(p: TiedNormal, q: Independent) -> Tensor:
    normal = _row_normal(q)
    if normal is None:
        raise NotImplementedError(f"KL of a TiedNormal from {q!r}")
    prior_scale = _centred_scale(normal)
    if prior_scale is not None and p.batch_shape == q.batch_shape:
        parameters = p.loc, p.row_log_scale, p.column_log_scale
        if p.rank is None:
            return tied_rows_kl(*parameters, prior_scale)
        if p.loc.dim() == 2:
            return factorised_rows_kl(*parameters, prior_scale)
    size = p.event_shape[0]
    precision = _unexpanded(normal.scale).square().reciprocal()
    error, log_scale = p.loc - normal.loc, p.log_scale_sums()
    if precision.shape[-1] == 1:
        # One scale for a row: sums of its variances and squares, without a matrix of either.
        moment = (p.variance_sums() + square_norms(error)) * precision.squeeze(-1)
    else:
        moment = _dot(p.variance + error.square(), precision, size)
    return 0.5 * (moment - size) + _log_sum(normal.scale) - log_scale


@register_kl(TiedNormal, TiedNormal)
def _kl_tied_normal_tied_normal(p: TiedNormal, q: TiedNormal) -> Tensor:
    ratio = (p.variance + (p.loc - q.loc).square()) / q.variance
    log_ratio = p.log_scale_sums() - q.log_scale_sums()
    return 0.5 * (ratio.sum(-1) - p.event_shape[0]) - log_ratio


@register_kl(GatedColumns, Independent)
def _kl_gated_columns_independent_normal(p: GatedColumns, q: Independent) -> Tensor:
    """Averaged over the columns' inclusions: see `GatedColumns`, whose excluded columns are q's."""
    normal = _row_normal(q)
    if normal is None:
        raise NotImplementedError(f"KL of GatedColumns from {q!r}")
    return p.kl_from(normal)


@register_kl(JointNormal, Independent)
def _kl_joint_normal_independent_normal(p: JointNormal, q: Independent) -> Tensor:
    """Over the entries that q's mask leaves in: their marginal under p against q."""
    base, mask = q.base_dist, None
    if isinstance(base, MaskedDistribution) and isinstance(base._mask, Tensor):
        base, mask = base.base_dist, base._mask.expand(p.event_shape)
    if not isinstance(base, Normal) or p.event_shape != q.event_shape:
        raise NotImplementedError(f"KL of a JointNormal from {q!r}")
    factor, error, scale = p.scale_tril, (p.loc - base.loc).flatten(), base.scale.flatten()
    if mask is None:
        log_det = factor.diagonal().log().sum()
    else:
        inside = mask.flatten().nonzero().squeeze(1)
        factor, error, scale = factor[inside], error[inside], scale[inside]
        # Of the rows themselves, in float64: their Gram matrix has the square of the condition.
        triangular = torch.linalg.qr(factor.T.double()).R
        log_det = triangular.diagonal().abs().log().sum().to(factor.dtype)
    quadratic = (factor.square().sum(1) + error.square()) / scale.square()
    return 0.5 * (quadratic - 1).sum() + scale.log().sum() - log_det


@register_kl(LogNormal, Gamma)
def _kl_log_normal_gamma(p: LogNormal, q: Gamma) -> Tensor:
    """-a log b + lgamma(a) - a m + b exp(m + s²/2) - log s - ½ log(2πe)."""
    return log_normal_gamma_kl(p.loc, p.scale, q.concentration, q.rate.log())


@register_kl(LogNormal, InverseGamma)
def _kl_log_normal_inverse_gamma(p: LogNormal, q: InverseGamma) -> Tensor:
    """That of 1/x, which is log-normal with location -m, from the gamma."""
    return log_normal_gamma_kl(-p.loc, p.scale, q.concentration, q.rate.log())


register_kl(LogNormal, PyroInverseGamma)(_kl_log_normal_inverse_gamma)


@register_kl(Independent, HalfCauchyFactors)
def _kl_log_normal_half_cauchy_factors(p: Independent, q: HalfCauchyFactors) -> Tensor:
    base = p.base_dist
    if not isinstance(base, LogNormal) or p.event_shape != q.event_shape:
        raise NotImplementedError(f"KL of {p!r} from HalfCauchyFactors")
    sign, shape, log_rate = q.log_gammas
    return log_normal_gamma_kl(sign * base.loc, base.scale, shape, log_rate).sum(-1)


@register_kl(MarkovChain, MarkovChain)
def _kl_markov_chain(p: MarkovChain, q: MarkovChain) -> Tensor:
    """KL of the first nodes, and of every step averaged over the node before it under p."""
    if p.event_shape != q.event_shape:
        raise ValueError(f"KL between chains of lengths {p.event_shape[0]} and {q.event_shape[0]}")
    before = p.log_marginals()[..., :-1, :].exp()
    steps = gate(before, _kl_inclusion(p.transition_logits, q.transition_logits))
    return _kl_inclusion(p.initial_logits, q.initial_logits) + steps.sum((-1, -2))


@register_kl(Normal, NormalJeffreys)
def _kl_normal_normal_jeffreys(p: Normal, q: NormalJeffreys) -> Tensor:
    """Up to 0.0095 nats, and 0 at an infinite σ²/μ²; see NormalJeffreys."""
    # A mean whose square underflows counts as the smallest number: log α is large, not infinite.
    square = p.loc.square().clamp_min(torch.finfo(p.loc.dtype).tiny)
    log_alpha = 2 * p.scale.log() - square.log()
    # k1 − k1 sigmoid(x) without the difference
    sigmoid = torch.sigmoid(-(1.87320 + 1.48695 * log_alpha))
    return 0.63576 * sigmoid + 0.5 * softplus(-log_alpha)


@register_kl(TruncatedNormal, Uniform)
def _kl_truncated_normal_uniform(p: TruncatedNormal, q: Uniform) -> Tensor:
    return _kl_from_uniform(p, q.low, q.high)


@register_kl(TruncatedLogNormal, LogUniform)
def _kl_truncated_log_normal_log_uniform(p: TruncatedLogNormal, q: LogUniform) -> Tensor:
    return _kl_from_uniform(p.log_distribution, q.low, q.high)


def _kl_from_uniform(p: TruncatedNormal, low: Tensor, high: Tensor) -> Tensor:
    """log(high - low) - entropy of p; infinite where p reaches beyond [low, high]."""
    covered = (low <= p.low) & (p.high <= high)
    log_width = torch.where(covered, (high.double() - low.double()).log(), math.inf)
    return (log_width - p.double_entropy()).to(p.loc.dtype)


def _kl_inclusion(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(Bernoulli ‖ Bernoulli) from logits; also where they are saturated or infinite."""
    p_logits, q_logits = torch.broadcast_tensors(p_logits, q_logits)
    return spike_and_slab_kl(p_logits, q_logits, torch.zeros_like(p_logits))


def is_closed(p: Distribution, q: Distribution) -> bool:
    """Whether ``kl_divergence(p, q)`` is one, and the KL of slabs in it no estimate."""
    inner_p, inner_q = p, q
    while isinstance(inner_p, Independent):
        inner_p = inner_p.base_dist
    while isinstance(inner_q, Independent):
        inner_q = inner_q.base_dist
    if isinstance(inner_p, SpikeAndSlab) and isinstance(inner_q, SpikeAndSlab):
        return is_closed(inner_p.slab, inner_q.slab)
    try:
        kl_divergence(p, q)
    except NotImplementedError:
        return False
    return True


def _kl_slabs(p: Distribution, q: Distribution) -> Tensor:
    """KL of the slabs; where none is registered, an unbiased estimate by a draw of p.

    Normal rows are summed directly: half the passes over the weights.
    """
    p_normal, q_normal = _row_normal(p), _row_normal(q)
    if p_normal is None or q_normal is None:
        try:
            return kl_divergence(p, q)
        except NotImplementedError:
            if not p.has_rsample:
                raise
            draw = p.rsample()
            estimate: Tensor = p.log_prob(draw) - q.log_prob(draw)
            return estimate
    prior_scale = _centred_scale(q_normal)
    if prior_scale is not None and p.batch_shape == q.batch_shape:
        return normal_kl(p_normal.loc, _log_scale(p_normal), prior_scale, by_row=True)
    size = p.event_shape[0]
    precision = _unexpanded(q_normal.scale).square().reciprocal()
    moment = p_normal.scale.square() + (p_normal.loc - q_normal.loc).square()
    log_ratio = _log_sum(q_normal.scale) - _log_sum(p_normal.scale)
    return 0.5 * (_dot(moment, precision, size) - size) + log_ratio


def _log_scale(p: Normal) -> Tensor:
    log_scale: Tensor = p.log_scale if isinstance(p, LogScaleNormal) else p.scale.log()
    return log_scale


def _row_normal(distribution: Distribution) -> Normal | None:
    """The Normal of an ``Independent(Normal, 1)``; None for anything else."""
    if not isinstance(distribution, Independent) or len(distribution.event_shape) != 1:
        return None
    base = distribution.base_dist
    return base if isinstance(base, Normal) else None


_PERHAPS_WITH_ATOMS = (Delta, MaskedMixture, MixtureSameFamily)
_CENTRED_SCALES: WeakKeyDictionary[Normal, tuple[tuple[Any, ...], float | None]]
_CENTRED_SCALES = WeakKeyDictionary()


def _centred_scale(normal: Normal) -> float | None:
    """The one scale of normals that all have mean 0, where both are constants; None otherwise.

    A prior is mostly that. Models keep theirs, so that looking at the numbers, which waits for a
    device, is done once for as long as they stay.
    """
    loc, scale = normal.loc, normal.scale
    if is_transformed() or loc.requires_grad or scale.requires_grad:
        return None
    version = loc, scale, loc._version, scale._version
    known = _CENTRED_SCALES.get(normal)
    if known is not None and all(map(operator.is_, known[0], version)):
        return known[1]
    loc, scale = _unexpanded(loc), _unexpanded(scale)
    one = scale.numel() == 1 and not loc.is_meta  # which has shapes only
    value = float(scale) if one and not bool(loc.any()) else None
    _CENTRED_SCALES[normal] = version, value
    return value


def _unexpanded(tensor: Tensor) -> Tensor:
    """Cuts expanded dimensions back to size 1: a prior's scale is mostly one number."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _dot(values: Tensor, weights: Tensor, size: int) -> Tensor:
    """Sum over rows of length ``size`` of values * weights; weights may be constant along a row."""
    if weights.shape[-1] == 1 < size:
        return values.sum(-1) * weights.squeeze(-1)
    return (values * weights).sum(-1)


def _log_sum(scale: Tensor) -> Tensor:
    """Row sums of log(scale)."""
    logs = _unexpanded(scale).log()
    return logs.sum(-1) * (scale.shape[-1] // logs.shape[-1])
