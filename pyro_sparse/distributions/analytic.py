"""Functions with gradients of their own: few operations on units, few passes over weights.

A step of a small network is some hundred small operations, each of which costs microseconds
whatever its size, and twice more where autograd has to remember it; a step of a large one is passes
over its weights. What every step needs for every layer is therefore written out here once with its
derivative. Everything is a sum over units or rows; shapes are those of the arguments.

Beside it stands the plain formula, from which autograd makes what the first derivative does not
cover: second derivatives, ``torch.func``, and the JIT's traces.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.functional import logsigmoid

__all__ = [
    "Fused",
    "broadcast_floating",
    "factorised_rows_kl",
    "gate",
    "is_transformed",
    "log_normal_gamma_kl",
    "normal_draw",
    "normal_kl",
    "spike_and_slab_kl",
    "square_norms",
    "straight_through",
    "tied_rows_kl",
]


def is_transformed() -> bool:
    """Whether torch.func or the JIT look on, to which functions of their own are closed boxes."""
    return torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def broadcast_floating(*values: Tensor | float) -> tuple[Tensor, ...]:
    """Parameters as floating-point tensors of one shape and dtype.

    Integers become floating-point numbers, as Python's own do: a law of integers' dtype would
    round its draws.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    floating = [value.dtype for value in tensors if value.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floating or [torch.get_default_dtype()])
    device = tensors[0].device if tensors else None
    return torch.broadcast_tensors(
        *(torch.as_tensor(value, dtype=dtype, device=device) for value in values)
    )


class Fused(Function):
    """A function whose first derivative is written by hand.

    A subclass has ``plain``, the same in torch operations; ``forward``, which saves the tensors
    that ``plain`` takes before all others and sets ``ctx.constants`` to what it takes after them;
    and ``slope``, the vector-Jacobian product.
    """

    @classmethod
    def of(cls, *arguments: Any) -> Any:
        return cls.plain(*arguments) if is_transformed() else cls.apply(*arguments)

    @staticmethod
    def plain(*arguments: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def slope(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def arguments(ctx: Any) -> tuple[Any, ...]:
        """Those of ``plain``."""
        return ctx.saved_tensors[: len(ctx.needs_input_grad) - len(ctx.constants)] + ctx.constants

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        function, wanted = type(ctx)._forward_cls, ctx.needs_input_grad
        if not torch.is_grad_enabled():
            return function.slope(ctx, *gradients)
        # A derivative of this derivative may be asked for. Of views: one argument may have been
        # made of another, which is no business of a partial derivative.
        arguments = [
            one.view_as(one) if isinstance(one, Tensor) else one for one in function.arguments(ctx)
        ]
        values = function.plain(*arguments)
        values = values if isinstance(values, tuple) else (values,)
        pairs = [pair for pair in zip(values, gradients, strict=True) if pair[0].requires_grad]
        found = iter(
            torch.autograd.grad(
                [value for value, _ in pairs],
                [one for one, wants in zip(arguments, wanted, strict=True) if wants],
                [gradient for _, gradient in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
        return tuple(next(found) if wants else None for wants in wanted)


_NORMAL_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)


def gate(probability: Tensor, value: Tensor) -> Tensor:
    """probability · value, and 0, in the gradient too, for probability 0 and an infinite value."""
    return probability * torch.where(probability == 0, torch.zeros_like(value), value)


def _gated(probability: Tensor, value: Tensor) -> Tensor:
    """`gate`, which autograd does not follow."""
    return (probability * value).masked_fill_(probability == 0, 0.0)


class _SpikeAndSlabKL(Fused):
    @staticmethod
    def plain(logits: Tensor, prior_logits: Tensor, slab: Tensor) -> Tensor:
        included = logsigmoid(logits) - logsigmoid(prior_logits) + slab
        excluded = logsigmoid(-logits) - logsigmoid(-prior_logits)
        return gate(torch.sigmoid(logits), included) + gate(torch.sigmoid(-logits), excluded)

    @staticmethod
    def forward(ctx: Any, logits: Tensor, prior_logits: Tensor, slab: Tensor) -> Tensor:
        # Included and excluded as two rows.
        both, prior = torch.stack((logits, -logits)), torch.stack((prior_logits, -prior_logits))
        probability = torch.sigmoid(both)
        cost = logsigmoid(both).sub_(logsigmoid(prior))
        cost[0].add_(slab)
        ctx.save_for_backward(logits, prior_logits, slab, probability)
        ctx.constants = ()
        return _gated(probability, cost).sum(0)

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> Any:
        logits, prior_logits, slab, probability = ctx.saved_tensors
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

    Args:
        logits: of γ; any shape.
        prior_logits: of λ; the same shape.
        slab: the slab's own KL; the same shape.
    """
    value: Tensor = _SpikeAndSlabKL.of(logits, prior_logits, slab)
    return value


class _TiedRowsKL(Fused):
    @staticmethod
    def plain(
        loc: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, prior_scale: float
    ) -> Tensor:
        log_scale = row_log_scale.unsqueeze(-1) + column_log_scale
        return _plain_normal_kl(loc, log_scale, prior_scale).sum(-1)

    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, prior_scale: float
    ) -> Tensor:
        length, precision = loc.shape[-1], prior_scale**-2
        rows, columns = (2 * row_log_scale).exp_(), (2 * column_log_scale).exp_()
        total = columns.sum()
        value = _square_norms(loc).addcmul_(rows, total).mul_(0.5 * precision)
        value.sub_(row_log_scale, alpha=length).sub_(column_log_scale.sum())
        ctx.save_for_backward(loc, row_log_scale, column_log_scale, rows, columns, total)
        ctx.precision, ctx.constants = precision, (prior_scale,)
        return value.add_(length * (math.log(prior_scale) - 0.5))

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> Any:
        loc, _, _, rows, columns, total = ctx.saved_tensors
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

    Args:
        loc: μ, ``(..., m)``.
        row_log_scale: log u, ``(...)``.
        column_log_scale: log v, ``(m,)``.
        prior_scale: s.
    """
    value: Tensor = _TiedRowsKL.of(loc, row_log_scale, column_log_scale, prior_scale)
    return value


class _HalfSquares(Fused):
    """½ precision · value², or its sums over rows."""

    @staticmethod
    def plain(value: Tensor, precision: float, by_row: bool) -> Tensor:
        squares = 0.5 * precision * value.square()
        return squares.sum(-1) if by_row else squares

    @staticmethod
    def forward(ctx: Any, value: Tensor, precision: float, by_row: bool) -> Tensor:
        ctx.save_for_backward(value)
        ctx.constants = precision, by_row
        squares = _square_norms(value) if by_row else value.square()
        return squares.mul_(0.5 * precision)

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> Any:
        (value,), (precision, by_row) = ctx.saved_tensors, ctx.constants
        gradient = gradient if precision == 1 else gradient * precision
        return value * (gradient.unsqueeze(-1) if by_row else gradient), None, None


class _ScaleKL(Fused):
    """½ precision · σ² − log σ, or its sums over rows; remembers log σ only, which stays anyway."""

    @staticmethod
    def plain(log_scale: Tensor, precision: float, by_row: bool) -> Tensor:
        value = 0.5 * precision * (2 * log_scale).exp() - log_scale
        return value.sum(-1) if by_row else value

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, precision: float, by_row: bool) -> Tensor:
        ctx.save_for_backward(log_scale)
        ctx.constants = precision, by_row
        scale = log_scale.exp()
        squares = _square_norms(scale) if by_row else scale.square_()
        return squares.mul_(0.5 * precision).sub_(log_scale.sum(-1) if by_row else log_scale)

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> Any:
        (log_scale,), (precision, by_row) = ctx.saved_tensors, ctx.constants
        gradient = gradient.unsqueeze(-1) if by_row else gradient
        scaled = gradient if precision == 1 else gradient * precision
        return (2 * log_scale).exp_().mul_(scaled).sub_(gradient), None, None


def square_norms(rows: Tensor) -> Tensor:
    """Sums of squares along rows ``(..., m)``."""
    value: Tensor = _HalfSquares.of(rows, 2.0, True)
    return value


def normal_kl(loc: Tensor, log_scale: Tensor, prior_scale: float, by_row: bool = False) -> Tensor:
    r"""KL of every :math:`N(μ, σ²)` from :math:`N(0, s²)`, or its sums over rows.

    .. math:: \frac{σ² + μ²}{2 s²} − \tfrac12 − \log\frac{σ}{s}

    The gradients in μ and in σ are made one after the other: both at once would be the most memory
    that a step takes.

    Args:
        loc: μ.
        log_scale: log σ, of the same shape.
        prior_scale: s.
        by_row: sum over the last axis.
    """
    precision, constant = prior_scale**-2, math.log(prior_scale) - 0.5
    of_loc: Tensor = _HalfSquares.of(loc, precision, by_row)
    of_scale: Tensor = _ScaleKL.of(log_scale, precision, by_row)
    return (of_loc + of_scale).add_(loc.shape[-1] * constant if by_row else constant)


def _plain_normal_kl(loc: Tensor, log_scale: Tensor, prior_scale: float) -> Tensor:
    moment = (2 * log_scale).exp() + loc.square()
    return 0.5 * prior_scale**-2 * moment - log_scale + (math.log(prior_scale) - 0.5)


class _FactorisedRowsKL(Fused):
    @staticmethod
    def plain(
        loc: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, prior_scale: float
    ) -> Tensor:
        variance = (2 * row_log_scale).exp() @ (2 * column_log_scale).exp()
        return _plain_normal_kl(loc, 0.5 * variance.log(), prior_scale).sum(-1)

    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, prior_scale: float
    ) -> Tensor:
        ctx.precision, ctx.constants = prior_scale**-2, (prior_scale,)
        ctx.save_for_backward(loc, row_log_scale, column_log_scale)
        variance = (2 * row_log_scale).exp_() @ (2 * column_log_scale).exp_()
        value = _square_norms(loc).add_(variance.sum(-1)).mul_(0.5 * ctx.precision)
        value.sub_(variance.log_().sum(-1), alpha=0.5)
        return value.add_(loc.shape[-1] * (math.log(prior_scale) - 0.5))

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> Any:
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

    Args:
        loc: μ, ``(units, m)``.
        row_log_scale: log u, ``(units, k)``.
        column_log_scale: log v, ``(k, m)``.
        prior_scale: s.

    Returns:
        ``(units,)``.
    """
    value: Tensor = _FactorisedRowsKL.of(loc, row_log_scale, column_log_scale, prior_scale)
    return value


class _NormalDraw(Fused):
    @staticmethod
    def plain(loc: Tensor, noise: Tensor, gate: Tensor | None, *logs: Tensor) -> Tensor:
        scale = logs[0] if len(logs) == 1 else logs[0].unsqueeze(-1) + logs[1]
        draw = loc + scale.exp() * noise
        return draw if gate is None else draw * gate.unsqueeze(-1)

    @staticmethod
    def forward(ctx: Any, loc: Tensor, noise: Tensor, gate: Tensor | None, *logs: Tensor) -> Tensor:
        # The scale is made here, where autograd does not keep it; the noise becomes the draw.
        scale = logs[0].exp() if len(logs) == 1 else (logs[0].unsqueeze(-1) + logs[1]).exp_()
        draw = noise.mul_(scale).add_(loc)
        del scale
        if gate is None:
            ctx.mark_dirty(noise)
        ctx.save_for_backward(loc, draw, gate, *logs)
        ctx.constants = ()
        return draw if gate is None else draw * gate.unsqueeze(-1)

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> Any:
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

    @staticmethod
    def arguments(ctx: Any) -> tuple[Any, ...]:
        # The draw was written over the noise, which comes back from it.
        loc, draw, gate, *logs = ctx.saved_tensors
        with torch.no_grad():
            scale = _NormalDraw.plain(torch.zeros_like(loc), torch.ones_like(loc), None, *logs)
            return loc, (draw - loc) / scale, gate, *logs


def normal_draw(loc: Tensor, noise: Tensor, gate: Tensor | None, *logs: Tensor) -> Tensor:
    r"""Draws :math:`z (μ + σ ε)`.

    Args:
        loc: μ, of the shape of the draws ``(..., m)``.
        noise: ε, standard normal, of the shape of the draws, which are written over it.
        gate: z, ``(...)``, or None for 1.
        logs: log σ; or log u ``(...)`` and log v ``(m,)`` where :math:`σ = u v`.
    """
    value: Tensor = _NormalDraw.of(loc, noise, gate, *logs)
    return value


def _square_norms(rows: Tensor) -> Tensor:
    """Sums of squares along rows, in one pass."""
    return torch.linalg.vector_norm(rows, dim=-1).square_()


class _LogNormalGammaKL(Fused):
    @staticmethod
    def plain(loc: Tensor, scale: Tensor, shape: Tensor, log_rate: Tensor) -> Tensor:
        log_ratio = log_rate + loc
        cross = (0.5 * scale.square() + log_ratio).exp()
        value = torch.lgamma(shape) - shape * log_ratio + cross - scale.log()
        return value - _NORMAL_ENTROPY

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, shape: Tensor, log_rate: Tensor) -> Tensor:
        log_ratio = log_rate + loc
        cross = (0.5 * scale.square()).add_(log_ratio).exp_()  # rate · E x, in log space
        ctx.save_for_backward(loc, scale, shape, log_rate, log_ratio, cross)
        ctx.constants = ()
        value = torch.lgamma(shape) - shape * log_ratio + cross - scale.log()
        return value.sub_(_NORMAL_ENTROPY)

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> Any:
        _, scale, shape, _, log_ratio, cross = ctx.saved_tensors
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

    Args:
        loc: m.
        scale: s.
        shape: a.
        log_rate: log b; the product with the mean stays in log space.
    """
    arguments = torch.broadcast_tensors(loc, scale, shape, log_rate)
    value: Tensor = _LogNormalGammaKL.of(*arguments)
    return value


class _StraightThrough(Fused):
    @staticmethod
    def plain(logits: Tensor, noise: Tensor, temperature: Tensor, hard: bool) -> Tensor:
        soft = ((logits + noise) / temperature).sigmoid()
        return (soft > 0.5).to(soft.dtype) + (soft - soft.detach()) if hard else soft

    @staticmethod
    def forward(ctx: Any, logits: Tensor, noise: Tensor, temperature: Tensor, hard: bool) -> Tensor:
        noisy = logits + noise
        scaled = noisy / temperature
        moves = ctx.needs_input_grad[2]
        soft = scaled.sigmoid() if moves else scaled.sigmoid_()
        ctx.save_for_backward(logits, noise, temperature, soft, scaled if moves else None)
        ctx.constants = (hard,)
        return noisy.gt_(0) if hard else soft  # in place, or two conversions were needed

    @staticmethod
    def slope(ctx: Any, gradient: Tensor) -> Any:
        _, _, temperature, soft, scaled = ctx.saved_tensors
        slope = torch.ops.aten.sigmoid_backward(gradient, soft).div_(temperature)
        by_temperature = None
        if ctx.needs_input_grad[2]:
            by_temperature = (-slope * scaled).sum_to_size(temperature.shape)
        return slope, None, by_temperature, None


def straight_through(logits: Tensor, noise: Tensor, temperature: Tensor, hard: bool) -> Tensor:
    """The binary concrete :math:`s = σ((\\text{logits} + ε) / t)`, or 1[s > ½] with its gradient.

    Args:
        logits: of the shape of the draw.
        noise: standard logistic ε, of the same shape.
        temperature: t, broadcastable.
        hard: whether the value is rounded; the gradient is that of s either way.
    """
    value: Tensor = _StraightThrough.of(logits, noise, temperature, hard)
    return value
