"""Functions with gradients of their own: few operations on units, few passes over weights.

A step of a small network is some hundred small operations, each of which costs microseconds
whatever its size, and twice more where autograd has to remember it; a step of a large one is passes
over its weights. What every step needs for every layer is therefore written out here once with its
derivative. Everything is a sum over units or rows; shapes are those of the arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import logsigmoid

__all__ = [
    "factorised_rows_kl",
    "gate",
    "log_normal_gamma_kl",
    "normal_draw",
    "normal_kl",
    "spike_and_slab_kl",
    "square_norms",
    "straight_through",
    "tied_rows_kl",
]

_NORMAL_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)


def gate(probability: Tensor, value: Tensor) -> Tensor:
    """probability · value, and 0, in the gradient too, for probability 0 and an infinite value."""
    return probability * torch.where(probability == 0, torch.zeros_like(value), value)


def _gated(probability: Tensor, value: Tensor) -> Tensor:
    """`gate`, which autograd does not follow."""
    return (probability * value).masked_fill_(probability == 0, 0.0)


class _SpikeAndSlabKL(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, prior_logits: Tensor, slab: Tensor) -> Tensor:
        # Included and excluded as two rows.
        both, prior = torch.stack((logits, -logits)), torch.stack((prior_logits, -prior_logits))
        probability = torch.sigmoid(both)
        cost = logsigmoid(both).sub_(logsigmoid(prior))
        cost[0].add_(slab)
        ctx.save_for_backward(probability, logits, prior_logits, slab)
        return _gated(probability, cost).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        probability, logits, prior_logits, slab = ctx.saved_tensors
        included, excluded = probability.unbind()
        by_logits = by_prior = by_slab = None
        if ctx.needs_input_grad[0]:
            price = (logits - prior_logits).add_(slab)
            by_logits = _gated(included * excluded, price).mul_(gradient)
        if ctx.needs_input_grad[1]:
            by_prior = excluded * torch.sigmoid(prior_logits)
            by_prior = gradient * (by_prior - included * torch.sigmoid(-prior_logits))
        if ctx.needs_input_grad[2]:
            by_slab = gradient * included
        return by_logits, by_prior, by_slab


def spike_and_slab_kl(logits: Tensor, prior_logits: Tensor, slab: Tensor) -> Tensor:
    r"""KL(Bern(γ) ‖ Bern(λ)) + γ · slab; also for saturated or infinite logits.

    .. math:: \frac{∂}{∂\,\text{logit}\,γ} = γ(1 − γ)(\text{logit}\,γ − \text{logit}\,λ + slab)

    :param logits: of γ; any shape.
    :param prior_logits: of λ; the same shape.
    :param slab: the slab's own KL; the same shape.
    """
    value: Tensor = _SpikeAndSlabKL.apply(logits, prior_logits, slab)
    return value


class _TiedRowsKL(Function):
    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, prior_scale: float
    ) -> Tensor:
        length, precision = loc.shape[-1], prior_scale**-2
        rows, columns = (2 * row_log_scale).exp_(), (2 * column_log_scale).exp_()
        total = columns.sum()
        value = _square_norms(loc).addcmul_(rows, total).mul_(0.5 * precision)
        value.sub_(row_log_scale, alpha=length).sub_(column_log_scale.sum())
        ctx.save_for_backward(loc, rows, columns, total)
        ctx.precision = precision
        return value.add_(length * (math.log(prior_scale) - 0.5))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        loc, rows, columns, total = ctx.saved_tensors
        scaled = gradient if ctx.precision == 1 else gradient * ctx.precision
        by_loc = by_row = by_column = None
        if ctx.needs_input_grad[0]:
            by_loc = loc * scaled.unsqueeze(-1)
        moments = scaled * rows
        if ctx.needs_input_grad[1]:
            by_row = (moments * total).sub_(gradient, alpha=loc.shape[-1])
        if ctx.needs_input_grad[2]:
            by_column = (columns * moments.sum()).sub_(gradient.sum())
        return by_loc, by_row, by_column, None


def tied_rows_kl(
    loc: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, prior_scale: float
) -> Tensor:
    r"""KL of rows :math:`N(μ_{ji}, u_j² v_i²)` from :math:`N(0, s²)`, ``(...)``.

    .. math::
        \frac{u_j² Σ_i v_i² + Σ_i μ_{ji}²}{2 s²} − m\left(\tfrac12 + \log\frac{u_j}{s}\right)
        − Σ_i \log v_i

    :param loc: μ, ``(..., m)``.
    :param row_log_scale: log u, ``(...)``.
    :param column_log_scale: log v, ``(m,)``.
    :param prior_scale: s.
    """
    value: Tensor = _TiedRowsKL.apply(loc, row_log_scale, column_log_scale, prior_scale)
    return value


class _HalfSquares(Function):
    """½ precision · value², or its sums over rows."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, precision: float, by_row: bool) -> Tensor:
        ctx.save_for_backward(value)
        ctx.precision, ctx.by_row = precision, by_row
        squares = _square_norms(value) if by_row else value.square()
        return squares.mul_(0.5 * precision)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (value,) = ctx.saved_tensors
        gradient = gradient if ctx.precision == 1 else gradient * ctx.precision
        return value * (gradient.unsqueeze(-1) if ctx.by_row else gradient), None, None


class _ScaleKL(Function):
    """½ precision · σ² − log σ, or its sums over rows; remembers log σ only, which stays anyway."""

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, precision: float, by_row: bool) -> Tensor:
        ctx.save_for_backward(log_scale)
        ctx.precision, ctx.by_row = precision, by_row
        scale = log_scale.exp()
        squares = _square_norms(scale) if by_row else scale.square_()
        return squares.mul_(0.5 * precision).sub_(log_scale.sum(-1) if by_row else log_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (log_scale,) = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1) if ctx.by_row else gradient
        scaled = gradient if ctx.precision == 1 else gradient * ctx.precision
        return (2 * log_scale).exp_().mul_(scaled).sub_(gradient), None, None


def square_norms(rows: Tensor) -> Tensor:
    """Sums of squares along rows ``(..., m)``."""
    value: Tensor = _HalfSquares.apply(rows, 2.0, True)
    return value


def normal_kl(loc: Tensor, log_scale: Tensor, prior_scale: float, by_row: bool = False) -> Tensor:
    r"""KL of every :math:`N(μ, σ²)` from :math:`N(0, s²)`, or its sums over rows.

    .. math:: \frac{σ² + μ²}{2 s²} − \tfrac12 − \log\frac{σ}{s}

    The gradients in μ and in σ are made one after the other: both at once would be the most memory
    that a step takes.

    :param loc: μ.
    :param log_scale: log σ, of the same shape.
    :param prior_scale: s.
    :param by_row: sum over the last axis.
    """
    precision, constant = prior_scale**-2, math.log(prior_scale) - 0.5
    of_loc: Tensor = _HalfSquares.apply(loc, precision, by_row)
    of_scale: Tensor = _ScaleKL.apply(log_scale, precision, by_row)
    return (of_loc + of_scale).add_(loc.shape[-1] * constant if by_row else constant)


class _FactorisedRowsKL(Function):
    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, prior_scale: float
    ) -> Tensor:
        ctx.precision = prior_scale**-2
        ctx.save_for_backward(loc, row_log_scale, column_log_scale)
        variance = (2 * row_log_scale).exp_() @ (2 * column_log_scale).exp_()
        value = _square_norms(loc).add_(variance.sum(-1)).mul_(0.5 * ctx.precision)
        value.sub_(variance.log_().sum(-1), alpha=0.5)
        return value.add_(loc.shape[-1] * (math.log(prior_scale) - 0.5))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        loc, row_log_scale, column_log_scale = ctx.saved_tensors
        rows, columns = (2 * row_log_scale).exp_(), (2 * column_log_scale).exp_()
        gradient = gradient.unsqueeze(-1)
        # Twice the derivative in the variance, which is what log u and log v want.
        by_variance = (rows @ columns).reciprocal_().neg_().add_(ctx.precision).mul_(gradient)
        by_row = (by_variance @ columns.T).mul_(rows)
        by_column = (rows.T @ by_variance).mul_(columns)
        del by_variance
        return loc * (gradient * ctx.precision), by_row, by_column, None


def factorised_rows_kl(
    loc: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, prior_scale: float
) -> Tensor:
    r"""KL of rows :math:`N(μ_{ji}, σ_{ji}²)` from :math:`N(0, s²)`.

    .. math:: σ_{ji}² = Σ_r u_{jr}² v_{ri}²

    The variances are made again for the gradient, and not held until then.

    :param loc: μ, ``(units, m)``.
    :param row_log_scale: log u, ``(units, k)``.
    :param column_log_scale: log v, ``(k, m)``.
    :param prior_scale: s.
    :returns: ``(units,)``.
    """
    value: Tensor = _FactorisedRowsKL.apply(loc, row_log_scale, column_log_scale, prior_scale)
    return value


class _NormalDraw(Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, noise: Tensor, gate: Tensor | None, *logs: Tensor) -> Tensor:
        # The scale is made here, where autograd does not keep it; the noise becomes the draw.
        scale = logs[0].exp() if len(logs) == 1 else (logs[0].unsqueeze(-1) + logs[1]).exp_()
        draw = noise.mul_(scale).add_(loc)
        del scale
        if gate is None:
            ctx.mark_dirty(noise)
        ctx.save_for_backward(loc, draw, gate, *logs)
        return draw if gate is None else draw * gate.unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        loc, draw, gate, *logs = ctx.saved_tensors
        by_loc, by_gate = gradient, None
        if gate is not None:
            if ctx.needs_input_grad[2]:
                by_gate = (gradient * draw).sum(-1)
            by_loc = gradient * gate.unsqueeze(-1)
        # σ ε is what the draw is beside its mean.
        by_log = (draw - loc).mul_(by_loc)
        if len(logs) == 1:
            by_logs = [by_log.sum_to_size(logs[0].shape)]
        else:
            by_logs = [
                by_log.sum(-1).sum_to_size(logs[0].shape),
                by_log.sum_to_size(logs[1].shape),
            ]
        return by_loc, None, by_gate, *by_logs


def normal_draw(loc: Tensor, noise: Tensor, gate: Tensor | None, *logs: Tensor) -> Tensor:
    r"""Draws :math:`z (μ + σ ε)`.

    :param loc: μ, of the shape of the draws ``(..., m)``.
    :param noise: ε, standard normal, of the shape of the draws, which are written over it.
    :param gate: z, ``(...)``, or None for 1.
    :param logs: log σ; or log u ``(...)`` and log v ``(m,)`` where :math:`σ = u v`.
    """
    value: Tensor = _NormalDraw.apply(loc, noise, gate, *logs)
    return value


def _square_norms(rows: Tensor) -> Tensor:
    """Sums of squares along rows, in one pass."""
    return torch.linalg.vector_norm(rows, dim=-1).square_()


class _LogNormalGammaKL(Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, shape: Tensor, log_rate: Tensor) -> Tensor:
        log_ratio = log_rate + loc
        cross = (0.5 * scale.square()).add_(log_ratio).exp_()  # rate · E x, in log space
        ctx.save_for_backward(scale, shape, log_ratio, cross)
        value = torch.lgamma(shape) - shape * log_ratio + cross - scale.log()
        return value.sub_(_NORMAL_ENTROPY)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        scale, shape, log_ratio, cross = ctx.saved_tensors
        by_loc = by_scale = by_shape = None
        by_ratio = gradient * (cross - shape)
        if ctx.needs_input_grad[0]:
            by_loc = by_ratio
        if ctx.needs_input_grad[1]:
            by_scale = gradient * torch.addcmul(-scale.reciprocal(), cross, scale)
        if ctx.needs_input_grad[2]:
            by_shape = gradient * (torch.digamma(shape) - log_ratio)
        return by_loc, by_scale, by_shape, by_ratio if ctx.needs_input_grad[3] else None


def log_normal_gamma_kl(loc: Tensor, scale: Tensor, shape: Tensor, log_rate: Tensor) -> Tensor:
    r"""KL(LogNormal(m, s²) ‖ Gamma(a, b)), all of one shape.

    .. math:: \log Γ(a) − a (\log b + m) + b\, e^{m + s²/2} − \log s − \tfrac12 \log 2πe

    :param loc: m.
    :param scale: s.
    :param shape: a.
    :param log_rate: log b; the product with the mean stays in log space.
    """
    arguments = torch.broadcast_tensors(loc, scale, shape, log_rate)
    value: Tensor = _LogNormalGammaKL.apply(*arguments)
    return value


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, noise: Tensor, temperature: Tensor, hard: bool) -> Tensor:
        noisy = logits + noise
        scaled = noisy / temperature
        moves = ctx.needs_input_grad[2]
        soft = scaled.sigmoid() if moves else scaled.sigmoid_()
        ctx.save_for_backward(soft, scaled if moves else None, temperature)
        return noisy.gt_(0) if hard else soft  # in place, or two conversions were needed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        soft, scaled, temperature = ctx.saved_tensors
        slope = torch.ops.aten.sigmoid_backward(gradient, soft).div_(temperature)
        by_temperature = None
        if ctx.needs_input_grad[2]:
            by_temperature = (-slope * scaled).sum_to_size(temperature.shape)
        return slope, None, by_temperature, None


def straight_through(logits: Tensor, noise: Tensor, temperature: Tensor, hard: bool) -> Tensor:
    """The binary concrete :math:`s = σ((\\text{logits} + ε) / t)`, or 1[s > ½] with its gradient.

    :param logits: of the shape of the draw.
    :param noise: standard logistic ε, of the same shape.
    :param temperature: t, broadcastable.
    :param hard: whether the value is rounded; the gradient is that of s either way.
    """
    value: Tensor = _StraightThrough.apply(logits, noise, temperature, hard)
    return value
