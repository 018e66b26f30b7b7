"""Local reparameterisation: sample a layer's outputs instead of its weights.

For a linear layer whose rows are Gaussian given the inclusion draw, an example's outputs are
Gaussian and independent of one another:

.. math:: a_j ∼ N(Σ_i μ_{ji} x_i, Σ_i σ_{ji}² x_i²).

Drawing :math:`a` rather than :math:`w` gives every example noise of its own, which lowers the
gradient's variance, and the expected log-likelihood is the same: it is a sum over examples
(Kingma, Salimans, Welling, NeurIPS 2015). With a tied variance σ_ji = u_j v_i the second product is
a matrix–vector product, :math:`u_j \\sqrt{Σ_i v_i² x_i²}`.

It works on any network: the guide's rows are handed on as a :class:`RandomRows` tensor that
``torch.nn.functional.linear`` understands. *Any other operation sees an ordinary weight draw*, so
results stay unbiased: convolutions, and linear layers shared along a sequence, apply one weight to
many positions, whose outputs are not independent. Nor are those of a layer that is applied twice:
guides do not mark such rows.

A multiplier of units, an inclusion or a noise, multiplies the outputs of linear layers rather than
their weights. It can be drawn for every example: then those of convolutions are multiplied, too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import Delta, Independent, MaskedDistribution, Normal
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.autograd.function import Function

from pyro_sparse.distributions import (
    GatedColumns,
    LogScaleNormal,
    RelaxedSpikeAndSlab,
    SpikeAndSlab,
    TiedNormal,
)
from pyro_sparse.precision import autocast_enabled

__all__ = ["FullScale", "LocalReparameterisation", "RandomRows", "RowLaw", "TiedScale"]

_FEW = 4096
"""So many random numbers are drawn sooner than others are copied."""


def _first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a derivative that cannot be differentiated again, so that nobody gets a 0 for it."""

    @functools.wraps(backward)
    def only(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "layers whose outputs are sampled have no second derivatives: use "
                "ELBO(local_reparameterisation=False)"
            )
        return backward(ctx, *gradients)

    return only


@dataclass(frozen=True)
class FullScale:
    """A standard deviation a weight, ``(units, row length)``.

    value:       σ, or its log
    logarithmic: whether it is the log
    """

    value: Tensor
    logarithmic: bool = False

    def columns(self, columns: slice) -> Tensor:
        """Of some columns, ``(units, columns)``."""
        part = self.value[:, columns]
        return part.exp() if self.logarithmic else part

    def of_outputs(self, squares: Tensor, with_bias: bool) -> Tensor:
        """Of a layer's outputs, ``(examples, units)``.

        Args:
            squares: of the inputs.
            with_bias: whether the last column is the bias.
        """
        variance, width = self.columns(slice(None)).square(), squares.shape[1]
        return _root(
            F.linear(squares, variance[:, :width], variance[:, width] if with_bias else None)
        )


@dataclass(frozen=True)
class TiedScale:
    """Variances :math:`Σ_r u_{jr}² v_{ri}²`; vectors where there is one term.

    rows:    log u, ``(units,)`` or ``(units, k)``
    lengths: log v, ``(row length,)`` or ``(k, row length)``
    """

    rows: Tensor
    lengths: Tensor

    def columns(self, columns: slice) -> Tensor:
        """Of some columns, ``(units, columns)``."""
        lengths = self.lengths[..., columns]
        if lengths.dim() == 1:
            return (self.rows.unsqueeze(1) + lengths).exp()
        return ((2 * self.rows).exp() @ (2 * lengths).exp()).sqrt()

    def of_outputs(self, squares: Tensor, with_bias: bool) -> Tensor:
        """Of a layer's outputs, ``(examples, units)``; see :class:`FullScale`."""
        width = squares.shape[1]
        lengths = torch.atleast_2d(2 * self.lengths).exp()
        terms = F.linear(squares, lengths[:, :width], lengths[:, width] if with_bias else None)
        rows = (2 * self.rows).exp()
        return _root(terms * rows if rows.dim() == 1 else terms @ rows.T)


@dataclass(eq=False)
class RowLaw:
    """The law of a matrix' rows, :math:`r_j (μ_j + σ_j ⊙ ε_j)`, and the one draw of it.

    loc:        μ, ``(units, row length)``
    scale:      σ; None for 0, a point
    multiplier: r, ``(units,)``, ``(examples, units)`` or None
    examples:   rows of the inputs whose outputs are sampled
    sampled:    whether a layer's outputs were, so that its weights need no draw
    noise:      ε of the draw of the whole matrix, where it was made before
    """

    loc: Tensor
    scale: FullScale | TiedScale | None
    multiplier: Tensor | None
    examples: int | None
    sampled: bool = False
    noise: Tensor | None = None
    _pieces: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def by_example(self) -> bool:
        """Whether every example has a multiplier of its own."""
        return self.multiplier is not None and self.multiplier.dim() == 2

    def take_noise(self) -> Tensor | None:
        """The noise, for the one draw that is made of it."""
        noise, self.noise = self.noise, None
        return noise

    @functools.cached_property
    def draw(self) -> Tensor:
        """Of the whole matrix; without the multiplier where every example has its own."""
        gate = None if self.by_example else self.multiplier
        noise = self.take_noise()
        if isinstance(self.scale, TiedScale):
            law = TiedNormal.from_logs(self.loc, self.scale.rows, self.scale.lengths)
            return law.rsample(gate=gate, noise=noise)
        if isinstance(self.scale, FullScale) and self.scale.logarithmic:
            return LogScaleNormal(self.loc, self.scale.value).rsample(gate=gate, noise=noise)
        draw = self.part(slice(None), noise)
        return draw if gate is None else draw * gate.unsqueeze(1)

    def part(self, columns: slice, noise: Tensor | None = None) -> Tensor:
        """A draw of some columns, without the multiplier."""
        loc = self.loc[:, columns]
        if self.scale is None:
            return loc
        noise = torch.randn_like(loc) if noise is None else noise
        return torch.addcmul(loc, self.scale.columns(columns), noise)

    def pieces(self, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The draw in parts, whose gradients are put together in one pass."""
        if sizes not in self._pieces:
            self._pieces[sizes] = self.draw.split_with_sizes(sizes, 1)
        return self._pieces[sizes]


class RandomRows(Tensor):
    r"""A random matrix, rows :math:`r_j (μ_j + σ_j ⊙ ε_j)`, that is sampled where it is used.

    Slices and splits of columns (``rows[:, a:b]``), reshaping all but the first axis and
    multiplying by one number a row keep it random; ``F.linear`` on a matrix with one input an
    example samples its output; every other operation draws the weights once and uses the draw from
    then on.

    A multiplier with a row an example multiplies the outputs of linear layers and convolutions, and
    inputs, example by example; every other operation sees the first example's, one draw for all.

    law:     of all rows
    columns: first and last column that this tensor shows, in whatever shape
    """

    law: RowLaw
    columns: tuple[int, int]
    _piece: tuple[tuple[int, ...], int] | None
    _draw: Tensor | None

    @staticmethod
    def make(
        rows: Tensor,
        scale: FullScale | TiedScale | None,
        multiplier: Tensor | None,
        examples: int | None,
    ) -> RandomRows:
        """All rows; the arguments are those of :class:`RowLaw`."""
        return _shown(RowLaw(rows, scale, multiplier, examples), (0, rows.shape[1]))

    def show(
        self,
        start: int,
        stop: int,
        shape: Sequence[int] | None = None,
        piece: tuple[tuple[int, ...], int] | None = None,
    ) -> RandomRows:
        """The same law's columns ``start`` to ``stop``, counted from the first of all.

        Args:
            piece: sizes of a split of all columns, and which of its parts these are.
        """
        return _shown(self.law, (start, stop), shape, piece)

    def times(self, multiplier: Tensor) -> RandomRows:
        """The same columns of rows that are multiplied by ``multiplier``, too."""
        law, own = self.law, self.law.multiplier
        product = multiplier if own is None else own * multiplier
        other = RowLaw(law.loc, law.scale, product, law.examples, noise=law.take_noise())
        return _shown(other, self.columns, self.shape, self._piece)

    @property
    def loc(self) -> Tensor:
        """Locations, in this tensor's shape."""
        start, stop = self.columns
        loc = self.law.loc
        return (loc if stop - start == loc.shape[1] else loc[:, start:stop]).reshape(self.shape)

    @property
    def noise_on_units(self) -> bool:
        """Whether it has no scale and one number a unit: nothing but a multiplier."""
        return self.law.scale is None and self.law.loc.shape[1] == 1

    def draw(self) -> Tensor:
        """One draw of the weights; the same one each time."""
        if self._draw is None:
            value, multiplier = self.draw_unmultiplied(), self.law.multiplier
            if multiplier is not None and multiplier.dim() == 2:
                value = value * multiplier[0].reshape(-1, *[1] * (value.dim() - 1))
            self._draw = value
        return self._draw

    def draw_unmultiplied(self) -> Tensor:
        """The draw, without the multiplier where every example has its own."""
        law = self.law
        if self._piece is not None and not law.sampled:
            # All that is left of these rows is drawn, too: one draw of the whole.
            sizes, number = self._piece
            value = law.pieces(sizes)[number]
        elif law.sampled:
            value = law.part(slice(*self.columns))
            if law.multiplier is not None and not law.by_example:
                value = value * law.multiplier.unsqueeze(1)
        else:
            value = law.draw[:, slice(*self.columns)]
        return value if value.shape == self.shape else value.reshape(self.shape)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        drawn = any(isinstance(value, RandomRows) and value._draw is not None for value in args)
        if rule is not None and not drawn and (not kwargs or func in _LAYERS):
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            return func(*_drawn(args), **_drawn(kwargs))


def _shown(
    law: RowLaw,
    columns: tuple[int, int],
    shape: Sequence[int] | None = None,
    piece: tuple[tuple[int, ...], int] | None = None,
) -> RandomRows:
    start, stop = columns
    view = law.loc.detach()
    view = view if stop - start == view.shape[1] else view[:, start:stop]
    view = view if shape is None else view.reshape(shape)
    rows = torch.Tensor._make_subclass(RandomRows, view)
    rows.law, rows.columns, rows._piece, rows._draw = law, columns, piece, None
    return rows


def _drawn(value: Any) -> Any:
    """The value with every random matrix inside replaced by its draw."""
    if isinstance(value, RandomRows):
        return value.draw()
    if isinstance(value, dict):
        return {key: _drawn(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and any(
        isinstance(item, RandomRows | list | tuple) for item in value
    ):
        return type(value)(_drawn(item) for item in value)
    return value


def _root(variance: Tensor) -> Tensor:
    # The square root's gradient is infinite at 0, where a layer's inputs are all off.
    return variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()


def _getitem(rows: Any, index: Any) -> Any:
    if not (isinstance(rows, RandomRows) and isinstance(index, tuple) and len(index) == 2):
        return NotImplemented
    units, column = index
    if units != slice(None) or rows.dim() != 2 or not isinstance(column, int | slice):
        return NotImplemented
    first, width = rows.columns[0], rows.columns[1] - rows.columns[0]
    if isinstance(column, int):
        place = first + range(width)[column]
        return rows.show(place, place + 1, (len(rows),))
    start, stop, step = column.indices(width)
    return rows.show(first + start, first + stop) if step == 1 else NotImplemented


def _split(rows: Any, sizes: Any, dim: int = 0) -> Any:
    if rows.dim() != 2 or dim not in (1, -1):
        return NotImplemented
    first, sizes = rows.columns[0], tuple(sizes)
    whole = rows.columns == (0, rows.law.loc.shape[1])
    stops = itertools.pairwise(itertools.accumulate(sizes, initial=first))
    return tuple(
        rows.show(start, stop, None, (sizes, number) if whole else None)
        for number, (start, stop) in enumerate(stops)
    )


def _reshape(rows: Any, *shape: Any) -> Any:
    size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if not isinstance(rows, RandomRows) or tuple(size)[:1] != (len(rows),):
        return NotImplemented
    return rows.show(*rows.columns, size, rows._piece)


def _unsqueeze(rows: Any, dim: int) -> Any:
    if dim not in (-1, rows.dim()):
        return NotImplemented
    return rows.show(*rows.columns, (*rows.shape, 1), rows._piece)


def _multiply(left: Any, right: Any) -> Any:
    rows, factor = (left, right) if isinstance(left, RandomRows) else (right, left)
    law = rows.law
    if isinstance(factor, RandomRows):
        # A noise on units, one number a unit, joins the other's multiplier.
        if rows.noise_on_units:
            rows, factor = factor, rows
        if not factor.noise_on_units:
            return NotImplemented
        multiplier = factor.law.loc.reshape(-1)
        own = factor.law.multiplier
        return rows.times(multiplier if own is None else own * multiplier)
    if not isinstance(factor, Tensor):
        return NotImplemented
    units, one_a_unit = len(rows), (len(rows), *[1] * (rows.dim() - 1))
    if factor.shape == one_a_unit:
        return rows.times(factor.reshape(-1))
    if factor.shape == rows.shape and not isinstance(law.scale, TiedScale):
        flat, scale = factor.reshape(units, -1), law.scale
        if scale is not None:
            scale = FullScale(scale.columns(slice(*rows.columns)) * flat)
        loc = rows.loc.reshape(units, -1) * flat
        product = RandomRows.make(loc, scale, law.multiplier, law.examples)
        if loc.shape == law.loc.shape:
            product.law.noise = law.take_noise()
        return product.show(*product.columns, factor.shape)
    if not (law.by_example and rows.noise_on_units):
        return NotImplemented
    assert law.multiplier is not None
    if factor.dim() == rows.dim() == 2 and len(factor) == units:
        # Ordinary rows times a noise on units.
        return RandomRows.make(factor * law.loc, None, law.multiplier, law.examples)
    if factor.dim() == rows.dim() + 1 and len(factor) == law.examples:
        # A batch of inputs times a noise on their features or channels.
        noise = law.multiplier * law.loc.reshape(-1)
        return factor * noise.reshape(law.examples, *rows.shape)
    return NotImplemented


def _bias_fits(bias: Any, weight: RandomRows) -> bool:
    """Whether a bias is no random one, or one of the same rows."""
    return not isinstance(bias, RandomRows) or (bias.law is weight.law and bias._draw is None)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:  # named as F.linear's own
    if (
        not isinstance(weight, RandomRows)
        or isinstance(input, RandomRows)
        or not _bias_fits(bias, weight)
        or input.dim() != 2
        # More rows than examples are positions, which share one weight draw.
        or len(input) != weight.law.examples
        # Other layers of these rows have one; theirs is the cheaper way then.
        or "draw" in vars(weight.law)
    ):
        return NotImplemented
    law = weight.law
    law.sampled = True
    rows, scale, multiplier = law.loc, law.scale, law.multiplier
    width, of_rows = input.shape[1], isinstance(bias, RandomRows)
    parts = (weight, bias) if of_rows else (weight,)
    if not (
        weight.columns == (0, width)
        and rows.shape[1] == width + of_rows
        and (not of_rows or bias.columns == (width, width + 1))
    ):
        # Rows of more than one layer: those of this one, the bias last.
        rows = torch.cat([part.loc.reshape(len(rows), -1) for part in parts], 1)
        columns = [slice(*part.columns) for part in parts]
        if isinstance(scale, FullScale):
            value = torch.cat([scale.value[:, part] for part in columns], 1)
            scale = FullScale(value, scale.logarithmic)
        elif scale is not None:
            lengths = [scale.lengths[..., part] for part in columns]
            scale = TiedScale(scale.rows, torch.cat(lengths, -1))
    if autocast_enabled(rows.device):
        # The products in lower precision; the scales, which may be tiny, in their own.
        output = F.linear(input, rows[:, :width], rows[:, width] if of_rows else None)
        if scale is not None:
            with torch.autocast(rows.device.type, enabled=False):
                spread = scale.of_outputs(input.to(rows.dtype).square(), of_rows)
            output = output + (spread * _noise_like(spread)).to(output.dtype)
        output = output if multiplier is None else output * multiplier.to(output.dtype)
    elif scale is None:
        output = _PointLinear.apply(input, rows, multiplier)
    elif isinstance(scale, FullScale):
        output = _FullLinear.apply(input, rows, scale.value, scale.logarithmic, multiplier)
    else:
        layer = _TiedLinear if scale.lengths.dim() == 1 else _FactorisedLinear
        output = layer.apply(input, rows, scale.rows, scale.lengths, multiplier)
    return output if bias is None or of_rows else output + bias


def _noise_like(output: Tensor) -> Tensor:
    """Standard normal noise, of which the second half is the first with opposite signs.

    See `_fill`: an example's noise has the law it had, that of different examples at one unit is
    independent or opposite, and the sum over examples has the same expectation, for an eighth of
    the random numbers, all of which would take a tenth of a dense step. The gradient's variance is
    no larger.
    """
    noise = torch.empty_like(output)
    half = (len(output) + 1) // 2
    _fill(noise[:half])
    torch.neg(noise[: len(output) - half], out=noise[half:])
    return noise


def _fill(noise: Tensor) -> None:
    """Standard normal noise; of many numbers, each serves four examples, at another unit each."""
    examples, units = noise.shape
    served = min(4, units) if noise.numel() > _FEW else 1
    drawn = -(-examples // served)
    noise[:drawn].normal_()
    for number in range(1, served):
        again = noise[number * drawn : (number + 1) * drawn]
        shift, first = number * units // served, noise[: len(again)]
        again[:, shift:] = first[:, : units - shift]
        again[:, :shift] = first[:, units - shift :]


class _SampledLinear(Function):
    """Outputs ``gate · (x μᵀ + scale(x) ⊙ ε)`` of a linear layer, in as few passes as there can be.

    Subclasses say what the scale is. Everything of size examples × units or of the weights' is
    touched a small, fixed number of times, where autograd would keep and revisit each step. Where
    rows are one longer than the inputs, the bias is last.
    """

    @staticmethod
    def product(x: Tensor, rows: Tensor) -> Tensor:
        width = x.shape[1]
        if rows.shape[1] == width:
            return x.mm(rows.T)
        return torch.addmm(rows[:, width], x, rows[:, :width].T)

    @staticmethod
    def sampled(x: Tensor, rows: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of a given variance, over which is written, before the gate; ε over its root.

        Of the noise and the root, only their ratio is needed again.
        """
        root = variance.clamp_min_(torch.finfo(variance.dtype).tiny).sqrt_()
        output = _SampledLinear.product(x, rows)
        noise = _noise_like(output)
        output.addcmul_(root, noise)
        return output, noise.div_(root)

    @staticmethod
    def by_product(
        ctx: Any, gradient: Tensor, x: Tensor, rows: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """The gradients of :meth:`product` by x, where it is asked for, and by the rows."""
        by_x = gradient.mm(rows[:, : x.shape[1]]) if ctx.needs_input_grad[0] else None
        return by_x, _SampledLinear.by_rows(gradient, x, rows)

    @staticmethod
    def by_rows(gradient: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        width = x.shape[1]
        if rows.shape[1] == width:
            return gradient.T.mm(x)
        value = torch.empty_like(rows)
        torch.mm(gradient.T, x, out=value[:, :width])
        torch.sum(gradient, 0, out=value[:, width])
        return value

    @staticmethod
    def ungated(
        ctx: Any, gradient: Tensor, gate: Tensor | None, output: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient before the gate, and the gate's."""
        if gate is None:
            return gradient, None
        by_gate = None
        if ctx.needs_input_grad[-1]:
            assert output is not None
            by_gate = gradient * output
            by_gate = by_gate.sum(0) if gate.dim() == 1 else by_gate
        return gradient * gate, by_gate


class _PointLinear(_SampledLinear):
    """A scale of 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, gate: Tensor | None) -> Tensor:
        output = _SampledLinear.product(x, rows)
        ctx.save_for_backward(x, rows, gate, None if gate is None else output)
        return output if gate is None else output * gate

    @staticmethod
    @_first_order
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, rows, gate, output = ctx.saved_tensors
        gradient, by_gate = _SampledLinear.ungated(ctx, gradient, gate, output)
        return *_SampledLinear.by_product(ctx, gradient, x, rows), by_gate


class _TiedLinear(_SampledLinear):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        row_log_scale: Tensor,
        column_log_scale: Tensor,
        gate: Tensor | None,
    ) -> Tensor:
        squares, columns = x.square(), (2 * column_log_scale).exp_()
        width = x.shape[1]
        if len(columns) == width:
            variance = squares.mv(columns)
        else:
            variance = torch.addmv(columns[width:], squares, columns[:width])
        scale = _root(variance)
        output = _SampledLinear.product(x, rows)
        if len(x) % 2:
            noise = _noise_like(output).unsqueeze(0)
        else:
            # The second half's sign is that of its scale, here and in all gradients.
            noise = output.new_empty(1, len(x) // 2, output.shape[1])
            _fill(noise[0])
            scale[len(x) // 2 :].neg_()
        noise.mul_(row_log_scale.exp())
        parts = len(x) // noise.shape[1]
        output.view(parts, *noise.shape[1:]).addcmul_(scale.view(parts, -1, 1), noise)
        ctx.save_for_backward(
            x, squares, rows, columns, scale, noise, gate, None if gate is None else output
        )
        return output if gate is None else output * gate

    @staticmethod
    @_first_order
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, squares, rows, columns, scale, noise, gate, output = ctx.saved_tensors
        gradient, by_gate = _SampledLinear.ungated(ctx, gradient, gate, output)
        by_x, by_rows = _SampledLinear.by_product(ctx, gradient, x, rows)
        # By the scale, and, times it, by log u.
        moved = (noise * gradient.reshape(-1, *noise.shape[1:])).view(gradient.shape)
        by_variance = moved.sum(1).div_(scale)  # twice that
        by_row_scale = moved.T.mv(scale)
        by_column_scale = None
        if ctx.needs_input_grad[3]:
            by_column_scale = squares.T.mv(by_variance)
            if len(columns) > len(by_column_scale):
                by_column_scale = torch.cat((by_column_scale, by_variance.sum(0, keepdim=True)))
            by_column_scale.mul_(columns)
        if by_x is not None:
            by_x.addcmul_(x * columns[: x.shape[1]], by_variance.unsqueeze(1))
        return by_x, by_rows, by_row_scale, by_column_scale, by_gate


class _FactorisedLinear(_SampledLinear):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        row_log_scale: Tensor,
        column_log_scale: Tensor,
        gate: Tensor | None,
    ) -> Tensor:
        of_rows, columns = (2 * row_log_scale).exp_(), (2 * column_log_scale).exp_()
        terms = _SampledLinear.product(x.square(), columns)
        output, ratio = _SampledLinear.sampled(x, rows, terms.mm(of_rows.T))
        ctx.save_for_backward(
            x, rows, of_rows, columns, terms, ratio, gate, None if gate is None else output
        )
        return output if gate is None else output * gate

    @staticmethod
    @_first_order
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, rows, of_rows, columns, terms, ratio, gate, output = ctx.saved_tensors
        gradient, by_gate = _SampledLinear.ungated(ctx, gradient, gate, output)
        by_x, by_rows = _SampledLinear.by_product(ctx, gradient, x, rows)
        by_variance = gradient * ratio  # twice that of the variance
        by_terms = by_variance.mm(of_rows)
        by_row_scale = by_variance.T.mm(terms).mul_(of_rows)
        by_column_scale = _SampledLinear.by_rows(by_terms, x.square(), columns).mul_(columns)
        if by_x is not None:
            by_x.addcmul_(by_terms.mm(columns[:, : x.shape[1]]), x)
        return by_x, by_rows, by_row_scale, by_column_scale, by_gate


class _FullLinear(_SampledLinear):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        scale: Tensor,
        logarithmic: bool,
        gate: Tensor | None,
    ) -> Tensor:
        scale, ctx.logarithmic = scale.exp() if logarithmic else scale, logarithmic
        variance = _SampledLinear.product(x.square(), scale.square())
        output, ratio = _SampledLinear.sampled(x, rows, variance)
        ctx.save_for_backward(x, rows, scale, ratio, gate, None if gate is None else output)
        return output if gate is None else output * gate

    @staticmethod
    @_first_order
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, rows, scale, ratio, gate, output = ctx.saved_tensors
        gradient, by_gate = _SampledLinear.ungated(ctx, gradient, gate, output)
        width = x.shape[1]
        by_x, by_rows = _SampledLinear.by_product(ctx, gradient, x, rows)
        by_variance = gradient * ratio  # twice that of the variance
        by_scale = None
        if ctx.needs_input_grad[2]:
            by_scale = _SampledLinear.by_rows(by_variance, x.square(), scale).mul_(scale)
            by_scale = by_scale.mul_(scale) if ctx.logarithmic else by_scale
        if by_x is not None:
            by_x.addcmul_(by_variance.mm(scale[:, :width].square()), x)
        return by_x, by_rows, by_scale, None, by_gate


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A convolution's outputs, each channel multiplied by the example's own multiplier.

    Positions share one weight draw, and one multiplier.
    """

    def rule(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        if (
            not isinstance(weight, RandomRows)
            or isinstance(input, RandomRows)
            or not weight.law.by_example
            or not _bias_fits(bias, weight)
            or input.dim() != weight.dim()
            or len(input) != weight.law.examples
        ):
            return NotImplemented
        inside = bias.draw_unmultiplied() if isinstance(bias, RandomRows) else None
        output = function(input, weight.draw_unmultiplied(), inside, *args, **kwargs)
        trailing = [1] * (output.dim() - 2)
        multiplier = weight.law.multiplier
        assert multiplier is not None
        output = output * multiplier.reshape(*multiplier.shape, *trailing)
        return (
            output if bias is None or inside is not None else output + bias.reshape(-1, *trailing)
        )

    return rule


_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.split_with_sizes: _split,
    Tensor.reshape: _reshape,
    Tensor.unsqueeze: _unsqueeze,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    torch.mul: _multiply,
    F.linear: _linear,
    **{function: _convolution(function) for function in (F.conv1d, F.conv2d, F.conv3d)},
}
_LAYERS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
# Reading the metadata does not draw.
_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "requires_grad", "layout", "is_leaf", "ndim")
    ),
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.__len__,
}


class LocalReparameterisation(Messenger):
    """Effect handler: marked guide sites yield `RandomRows`.

    Sites marked ``local_reparameterisation`` are rows that are a point, Gaussian, or spike-and-slab
    with a Gaussian slab. Mark only sites that the model uses in one place: two uses would be
    sampled independently.

    Sites marked ``by_example`` have their inclusion drawn anew for every example, or, where they
    are noises on units, the noise; others once for the whole batch, by the guide's own law.

    Args:
        examples: size of the batch. Linear layers on as many rows have their outputs sampled. None:
            no outputs are sampled. Weights are put together from the noise where they are used, and
            their gradients taken apart when those of the layers before are still to come, which
            halves the memory for them.
    """

    def __init__(self, examples: int | None) -> None:
        super().__init__()
        self.examples = examples

    def _pyro_sample(self, msg: Any) -> None:
        infer = msg["infer"]
        if msg["value"] is not None:
            return
        by_example = infer.get("by_example", False) and self.examples is not None
        if infer.get("local_reparameterisation"):
            value = self._rows(msg["fn"], by_example)
            if value is not None and self.examples is None and value.law.scale is not None:
                value.law.noise = torch.randn_like(value.law.loc)
        elif by_example:
            draws = msg["fn"].rsample((self.examples,))
            one = torch.ones_like(draws[0]).unsqueeze(1)
            noise = RandomRows.make(one, None, draws, self.examples)
            value = noise.show(*noise.columns, (len(one),))
        else:
            return
        if value is not None:
            msg["value"], msg["done"] = value, True

    def _rows(self, law: Any, by_example: bool) -> RandomRows | None:
        """Rows of a law, or None where it needs an ordinary draw."""
        while isinstance(law, MaskedDistribution) or (
            isinstance(law, Independent) and not isinstance(law.base_dist, Normal)
        ):
            law = law.base_dist
        multiplier = None
        if isinstance(law, SpikeAndSlab):
            if not isinstance(law, RelaxedSpikeAndSlab):
                # The score-function estimator needs an ordinary draw of the joint law.
                return None
            multiplier = law.rsample_inclusion((self.examples,) if by_example else ())
            law = law.slab
        if isinstance(law, GatedColumns):
            # What reads an input that is out is multiplied by 0, and need not be drawn.
            law = law.inside
        if isinstance(law, TiedNormal):
            scale: Any = TiedScale(law.row_log_scale, law.column_log_scale)
            return RandomRows.make(law.loc, scale, multiplier, self.examples)
        if isinstance(law, Independent):
            law = law.base_dist
        if isinstance(law, LogScaleNormal):
            scale = FullScale(law.log_scale, logarithmic=True)
            return RandomRows.make(law.loc, scale, multiplier, self.examples)
        if isinstance(law, Normal):
            return RandomRows.make(law.loc, FullScale(law.scale), multiplier, self.examples)
        if isinstance(law, Delta) and law.v.dim() == 2:
            return RandomRows.make(law.v, None, multiplier, self.examples)
        return None
