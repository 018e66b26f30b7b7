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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import Independent, Normal
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab, TiedNormal

__all__ = ["GaussianRows", "LocalReparameterisation"]


class GaussianRows(Tensor):
    r"""A random matrix, rows :math:`r_j (μ_j + σ_j ⊙ ε_j)`, that is sampled where it is used.

    Slicing columns (``rows[:, a:b]``), reshaping all but the first axis and multiplying by one
    number a row keep it random; ``F.linear`` on a matrix with one input an example samples its
    output; every other operation draws the weights once and uses the draw from then on.

    loc:        ``(units, ...)``
    variance:   ``(units, ...)``, or with tied variances the pair ``(units,)`` and ``(1, ...)``
    multiplier: ``(units,)`` or None
    examples:   rows of the inputs whose outputs are sampled
    """

    loc: Tensor
    variance: Tensor | tuple[Tensor, Tensor]
    multiplier: Tensor | None
    examples: int
    _draw: Tensor | None

    @staticmethod
    def make(
        loc: Tensor,
        variance: Tensor | tuple[Tensor, Tensor],
        multiplier: Tensor | None,
        examples: int,
    ) -> GaussianRows:
        rows = torch.Tensor._make_subclass(GaussianRows, loc.detach())
        rows.loc, rows.variance, rows.multiplier = loc, variance, multiplier
        rows.examples, rows._draw = examples, None
        return rows

    def _with(self, loc: Tensor, change: Callable[[Tensor], Tensor]) -> GaussianRows:
        """The same multiplier over a changed location and equally changed variances."""
        if isinstance(self.variance, tuple):
            variance: Any = (self.variance[0], change(self.variance[1]))
        else:
            variance = change(self.variance)
        return GaussianRows.make(loc, variance, self.multiplier, self.examples)

    def draw(self) -> Tensor:
        """One draw of the weights; the same one each time."""
        if self._draw is None:
            variance = self.variance
            if isinstance(variance, tuple):
                rows, columns = variance
                variance = rows.reshape(-1, *[1] * (self.loc.dim() - 1)) * columns
            value = self.loc + _root(variance) * torch.randn_like(self.loc)
            if self.multiplier is not None:
                value = value * self.multiplier.reshape(-1, *[1] * (value.dim() - 1))
            self._draw = value
        return self._draw

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
        if rule is not None and not drawn and (not kwargs or func is F.linear):
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
            variance = rows.variance[index]
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


def _multiply(left: Any, right: Any) -> Any:
    rows, factor = (left, right) if isinstance(left, GaussianRows) else (right, left)
    one_a_row = (
        isinstance(factor, Tensor)
        and not isinstance(factor, GaussianRows)
        and factor.shape == (rows.loc.shape[0], *[1] * (rows.loc.dim() - 1))
    )
    if not one_a_row:
        return NotImplemented
    factor = factor.reshape(-1)
    multiplier = factor if rows.multiplier is None else rows.multiplier * factor
    return GaussianRows.make(rows.loc, rows.variance, multiplier, rows.examples)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:  # named as F.linear's own
    random_bias = isinstance(bias, GaussianRows)
    if (
        not isinstance(weight, GaussianRows)
        or isinstance(input, GaussianRows)
        or (random_bias and (bias.multiplier is not weight.multiplier or bias._draw is not None))
        or input.dim() != 2
        # More rows than examples are positions, which share one weight draw.
        or len(input) != weight.examples
    ):
        return NotImplemented
    mean = F.linear(input, weight.loc, bias.loc if random_bias else None)
    squares = input.square()
    if isinstance(weight.variance, tuple):
        rows, columns = weight.variance
        variance = torch.outer(squares @ columns[0], rows)
        if random_bias:
            variance = variance + bias.variance
    else:
        variance = F.linear(squares, weight.variance, bias.variance if random_bias else None)
    output = mean + _root(variance) * torch.randn_like(mean)
    if weight.multiplier is not None:
        output = output * weight.multiplier
    return output if bias is None or random_bias else output + bias


_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.reshape: _reshape,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    torch.mul: _multiply,
    F.linear: _linear,
}
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
    """Effect handler: guide sites marked ``local_reparameterisation`` yield `GaussianRows`.

    Applies to rows that are Gaussian, or spike-and-slab with a Gaussian slab; the inclusion is
    drawn once for the whole batch, by the guide's own distribution. Mark only sites that the model
    uses in one place: two uses would be sampled independently.

    :param examples: size of the batch. Linear layers on as many rows have their outputs sampled.
    """

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.examples = examples

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("local_reparameterisation") or msg["value"] is not None:
            return
        law = msg["fn"]
        while isinstance(law, Independent) and not isinstance(law.base_dist, Normal):
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
        else:
            return
        msg["value"] = GaussianRows.make(loc, variance, multiplier, self.examples)
        msg["done"] = True
