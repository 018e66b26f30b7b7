"""Local reparameterisation: sample a layer's outputs instead of its weights.

For a linear layer whose rows are Gaussian given the inclusion draw, an example's outputs are
Gaussian and independent of one another:

.. math:: a_j ∼ N(Σ_i μ_{ji} x_i, Σ_i σ_{ji}² x_i²).

Drawing :math:`a` rather than :math:`w` gives every example noise of its own, which lowers the
gradient's variance, and the expected log-likelihood is the same: it is a sum over examples
(Kingma, Salimans, Welling, NeurIPS 2015). With a tied variance σ_ji = u_j v_i the second product is
a matrix–vector product.

It works on any network: the guide's rows are handed on as a :class:`GaussianRows` tensor that
``torch.nn.functional.linear`` understands. *Any other operation sees an ordinary weight draw*, so
results stay unbiased: convolutions, and linear layers shared along a sequence, apply one weight to
many positions, whose outputs are not independent. Nor are those of a layer that is applied twice:
guides do not mark such rows.

A multiplicative noise on units can likewise be drawn for every example: its sites then yield a
:class:`GaussianRows` without variance whose multiplier has a row an example, and the layer's
outputs are multiplied by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import Independent, MaskedDistribution, Normal
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab, TiedNormal

__all__ = ["GaussianRows", "LocalReparameterisation"]


class GaussianRows(Tensor):
    r"""A random matrix, rows :math:`r_j (μ_j + σ_j ⊙ ε_j)`, that is sampled where it is used.

    Slicing columns (``rows[:, a:b]``), reshaping all but the first axis and multiplying by one
    number a row keep it random; ``F.linear`` on a matrix with one input an example samples its
    output; every other operation draws the weights once and uses the draw from then on.

    A multiplier with a row an example multiplies the outputs of linear layers and convolutions, and
    inputs, example by example; every other operation sees the first example's, one draw for all.

    loc:        ``(units, ...)``
    variance:   ``(units, ...)``, or with tied variances the pair ``(units,)`` and ``(1, ...)``, or
                None for 0
    multiplier: ``(units,)``, ``(examples, units)`` or None
    examples:   rows of the inputs whose outputs are sampled
    """

    loc: Tensor
    variance: Tensor | tuple[Tensor, Tensor] | None
    multiplier: Tensor | None
    examples: int
    _draw: Tensor | None

    @staticmethod
    def make(
        loc: Tensor,
        variance: Tensor | tuple[Tensor, Tensor] | None,
        multiplier: Tensor | None,
        examples: int,
    ) -> GaussianRows:
        rows = torch.Tensor._make_subclass(GaussianRows, loc.detach())
        rows.loc, rows.variance, rows.multiplier = loc, variance, multiplier
        rows.examples, rows._draw = examples, None
        return rows

    def _with(self, loc: Tensor, change: Callable[[Tensor], Tensor]) -> GaussianRows:
        """The same multiplier over a changed location and equally changed variances."""
        if self.variance is None:
            variance: Any = None
        elif isinstance(self.variance, tuple):
            variance = (self.variance[0], change(self.variance[1]))
        else:
            variance = change(self.variance)
        return GaussianRows.make(loc, variance, self.multiplier, self.examples)

    @property
    def by_example(self) -> bool:
        """Whether every example has a multiplier of its own."""
        return self.multiplier is not None and self.multiplier.dim() == 2

    def draw(self) -> Tensor:
        """One draw of the weights; the same one each time."""
        if self._draw is None:
            value = self.draw_unmultiplied()
            if self.multiplier is not None:
                multiplier = self.multiplier[0] if self.by_example else self.multiplier
                value = value * multiplier.reshape(-1, *[1] * (value.dim() - 1))
            self._draw = value
        return self._draw

    def draw_unmultiplied(self) -> Tensor:
        """A draw of :math:`μ_j + σ_j ⊙ ε_j`."""
        variance = self.variance
        if variance is None:
            return self.loc
        if isinstance(variance, tuple):
            rows, columns = variance
            variance = rows.reshape(-1, *[1] * (self.loc.dim() - 1)) * columns
        return self.loc + _root(variance) * torch.randn_like(self.loc)

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
        drawn = any(isinstance(value, GaussianRows) and value._draw is not None for value in args)
        if rule is not None and not drawn and (not kwargs or func in _LAYERS):
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            return func(*_drawn(args), **_drawn(kwargs))


def _drawn(value: Any) -> Any:
    """The value with every random matrix inside replaced by its draw."""
    if isinstance(value, GaussianRows):
        return value.draw()
    if isinstance(value, dict):
        return {key: _drawn(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and any(
        isinstance(item, GaussianRows | list | tuple) for item in value
    ):
        return type(value)(_drawn(item) for item in value)
    return value


def _root(variance: Tensor) -> Tensor:
    # The square root's gradient is infinite at 0, where a layer's inputs are all off.
    return variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()


def _getitem(rows: Any, index: Any) -> Any:
    columns = (
        isinstance(rows, GaussianRows)
        and rows.loc.dim() == 2
        and isinstance(index, tuple)
        and len(index) == 2
        and index[0] == slice(None)
    )
    if not columns:
        return NotImplemented
    if isinstance(index[1], int):
        # One column, the bias: a vector over units.
        if isinstance(rows.variance, tuple):
            variance: Any = rows.variance[0] * rows.variance[1][0, index[1]]
        else:
            variance = None if rows.variance is None else rows.variance[index]
        return GaussianRows.make(rows.loc[index], variance, rows.multiplier, rows.examples)
    return rows._with(rows.loc[index], lambda part: part[index])


def _reshape(rows: Any, *shape: Any) -> Any:
    size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if not isinstance(rows, GaussianRows) or tuple(size)[:1] != (rows.loc.shape[0],):
        return NotImplemented
    if tuple(size) == (rows.loc.shape[0],) and isinstance(rows.variance, tuple):
        # A single column becomes a vector: the tied factors have no second axis to live on.
        variance = rows.variance[0] * rows.variance[1].reshape(())
        return GaussianRows.make(rows.loc.reshape(size), variance, rows.multiplier, rows.examples)
    loc = rows.loc.reshape(size)
    return rows._with(loc, lambda part: part.reshape(part.shape[0], *size[1:]))


def _unsqueeze(rows: Any, dim: int) -> Any:
    if dim not in (-1, rows.loc.dim()) or isinstance(rows.variance, tuple):
        return NotImplemented
    return _reshape(rows, *rows.loc.shape, 1)


def _multiply(left: Any, right: Any) -> Any:
    rows, factor = (left, right) if isinstance(left, GaussianRows) else (right, left)
    if isinstance(factor, GaussianRows):
        # A multiplier without variance, one number a unit, joins the other's.
        if rows.variance is None and rows.loc.numel() == rows.loc.shape[0]:
            rows, factor = factor, rows
        if factor.variance is not None or factor.loc.numel() != factor.loc.shape[0]:
            return NotImplemented
        own = 1 if rows.multiplier is None else rows.multiplier
        other = 1 if factor.multiplier is None else factor.multiplier
        multiplier = own * (other * factor.loc.reshape(-1))
        return GaussianRows.make(rows.loc, rows.variance, multiplier, rows.examples)
    if not isinstance(factor, Tensor):
        return NotImplemented
    one_a_unit = (rows.loc.shape[0], *[1] * (rows.loc.dim() - 1))
    if factor.shape == one_a_unit:
        factor = factor.reshape(-1)
        multiplier = factor if rows.multiplier is None else rows.multiplier * factor
        return GaussianRows.make(rows.loc, rows.variance, multiplier, rows.examples)
    if factor.shape == rows.loc.shape and not isinstance(rows.variance, tuple):
        change = factor.square()
        return rows._with(rows.loc * factor, lambda part: part * change)
    if not rows.by_example or rows.variance is not None or rows.loc.shape != one_a_unit:
        return NotImplemented
    assert rows.multiplier is not None
    if factor.dim() == rows.loc.dim() and factor.shape[0] == rows.loc.shape[0]:
        # Ordinary rows times a noise on units.
        return GaussianRows.make(factor * rows.loc, None, rows.multiplier, rows.examples)
    if factor.dim() == rows.loc.dim() + 1 and len(factor) == rows.examples:
        # A batch of inputs times a noise on their features or channels.
        return factor * (rows.multiplier.reshape(rows.examples, *rows.loc.shape) * rows.loc)
    return NotImplemented


def _bias_fits(bias: Any, weight: GaussianRows) -> bool:
    """Whether a bias is no random one, or one of the same rows."""
    if not isinstance(bias, GaussianRows):
        return True
    return bias.multiplier is weight.multiplier and bias._draw is None


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:  # named as F.linear's own
    random_bias = isinstance(bias, GaussianRows)
    if (
        not isinstance(weight, GaussianRows)
        or isinstance(input, GaussianRows)
        or not _bias_fits(bias, weight)
        or input.dim() != 2
        # More rows than examples are positions, which share one weight draw.
        or len(input) != weight.examples
    ):
        return NotImplemented
    output = F.linear(input, weight.loc, bias.loc if random_bias else None)
    if weight.variance is not None:
        squares = input.square()
        if isinstance(weight.variance, tuple):
            rows, columns = weight.variance
            variance = torch.outer(squares @ columns[0], rows)
            if random_bias:
                variance = variance + bias.variance
        else:
            variance = F.linear(squares, weight.variance, bias.variance if random_bias else None)
        output = output + _root(variance) * torch.randn_like(output)
    if weight.multiplier is not None:
        output = output * weight.multiplier
    return output if bias is None or random_bias else output + bias


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A convolution's outputs, each channel multiplied by the example's own multiplier.

    Positions share one weight draw, and one multiplier.
    """

    def rule(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        if (
            not isinstance(weight, GaussianRows)
            or isinstance(input, GaussianRows)
            or not weight.by_example
            or not _bias_fits(bias, weight)
            or input.dim() != weight.loc.dim()
            or len(input) != weight.examples
        ):
            return NotImplemented
        inside = bias.draw_unmultiplied() if isinstance(bias, GaussianRows) else None
        output = function(input, weight.draw_unmultiplied(), inside, *args, **kwargs)
        trailing = [1] * (output.dim() - 2)
        assert weight.multiplier is not None
        output = output * weight.multiplier.reshape(*weight.multiplier.shape, *trailing)
        return (
            output if bias is None or inside is not None else output + bias.reshape(-1, *trailing)
        )

    return rule


_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
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
    """Effect handler: marked guide sites yield `GaussianRows`.

    Sites marked ``local_reparameterisation`` are rows that are Gaussian, or spike-and-slab with a
    Gaussian slab; the inclusion is drawn once for the whole batch, by the guide's own distribution.
    Mark only sites that the model uses in one place: two uses would be sampled independently.

    Sites marked ``by_example`` are noises on units, drawn anew for every example.

    :param examples: size of the batch. Linear layers on as many rows have their outputs sampled.
    """

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.examples = examples

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None:
            return
        if msg["infer"].get("by_example"):
            draws = msg["fn"].rsample((self.examples,))
            msg["value"] = GaussianRows.make(torch.ones_like(draws[0]), None, draws, self.examples)
            msg["done"] = True
        if not msg["infer"].get("local_reparameterisation"):
            return
        law = msg["fn"]
        while isinstance(law, MaskedDistribution) or (
            isinstance(law, Independent) and not isinstance(law.base_dist, Normal)
        ):
            law = law.base_dist
        multiplier = None
        if isinstance(law, SpikeAndSlab):
            if not isinstance(law, RelaxedSpikeAndSlab):
                # The score-function estimator needs an ordinary draw of the joint law.
                return
            multiplier, law = law.rsample_inclusion(), law.slab
        if isinstance(law, TiedNormal):
            variance: Any = (law.row_scale.square(), law.column_scale.square().unsqueeze(0))
            loc = law.loc
        elif isinstance(law, Independent) and isinstance(law.base_dist, Normal):
            loc, variance = law.base_dist.loc, law.base_dist.scale.square()
        elif isinstance(law, Normal):
            loc, variance = law.loc, law.scale.square()
        else:
            return
        msg["value"] = GaussianRows.make(loc, variance, multiplier, self.examples)
        msg["done"] = True
