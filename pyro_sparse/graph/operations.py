"""What each operation does to the units that pass through it, what it costs, and how it shrinks.

One object an operation: an :class:`Operation` says

* how labels and emissions pass (:meth:`Operation.follow`),
* which multiplications it costs (:meth:`Operation.products`),
* which of its arguments are others when units are gone (:meth:`Operation.shrunk`).

There are few kinds. *Layers* read columns of a weight and write rows; *pointwise* operations leave
every entry where it is; where several tensors meet, their units are tied (an addition) or one
multiplies the other (a gate); *mixing* operations (pooling, softmax, mean) mix entries along some
dimensions, along which units must not vary; *movements* are run on the labels; *contractions* sum
over units, or make a unit of what they sum over: a head.

To add one, register an object for torch's operation, of one's own library or of torch's::

    graph.register(torch.ops.mine.swish, operation=graph.Pointwise())

An operation that changes its input (``relu_``) goes with the one that does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .structure import Product, Width
from .units import KEPT, Value, compressed
from .walk import Step, Unsupported, Weight, positions, shape_of, unknown

if TYPE_CHECKING:
    from .removal import Removal

__all__ = [
    "Contraction",
    "Elementwise",
    "Mixing",
    "Movement",
    "Operation",
    "Pointwise",
    "operation_of",
    "register",
]

aten: Any = torch.ops.aten
Widths = Callable[[Tensor, int], Width]
ONE = Width(1, {})


class Operation:
    """What is known of an operation: nothing, so that its units stay.

    moves: whether it only moves entries, which removal then checks on the labels.
    layer: whether it writes rows, so that it matters even where no units come in.
    """

    moves = False
    layer = False

    def follow(self, step: Step) -> Any:
        """The value of its output, or a tuple of values.

        Raises:
            Unsupported: where its units cannot be followed.
        """
        raise Unsupported(f"{step} is not supported")

    def products(self, step: Step, width: Widths) -> Iterable[Product]:
        """What it costs.

        Args:
            width: the width of a dimension with these labels and of this many entries.
        """
        return ()

    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        """The arguments that are others once units are gone; None where none are.

        Raises:
            ValueError: where it cannot be made to fit.
        """
        return None


OPERATIONS: dict[Any, Operation] = {}


def register(*targets: Any, operation: Operation) -> None:
    """Say what operations do to units: of torch (``torch.ops.aten.relu``), or of one's own.

    Args:
        targets: operations, with all their overloads, or single overloads, which go before.
    """
    for target in targets:
        OPERATIONS[target] = operation
        namespace, _, name = str(target).partition(".")
        changing = getattr(getattr(torch.ops, namespace), f"{name}_", None) if name else None
        if changing is not None and isinstance(target, torch._ops.OpOverloadPacket):
            OPERATIONS[changing] = operation


def operation_of(target: Any) -> Operation | None:
    """The operation of a node's target; None where nobody has said anything of it."""
    if target in OPERATIONS:
        return OPERATIONS[target]
    return OPERATIONS.get(getattr(target, "overloadpacket", None))


def _named(names: str) -> list[Any]:
    """Torch's operations of these names; torch of another version may lack some."""
    return [getattr(aten, name) for name in names.split() if hasattr(aten, name)]


def _registered(names: str) -> Callable[[type], type]:
    """Register an operation for torch's own, by their names."""

    def decorate(kind: type) -> type:
        operation = kind()
        register(*_named(names), operation=operation)
        return kind

    return decorate


# -- layers --------------------------------------------------------------------------------------


def _bias(step: Step, weight: Weight, name: str = "bias") -> tuple[Weight | None, str | None]:
    """The bias, and the name of the parameter that it is or, where there is none, would be."""
    if step.given.get(name) is not None:
        bias = step.weight(name)
        assert bias is not None
        return bias, bias.name if bias.name in step.walk.parameters else None
    stem = weight.name.removesuffix("weight")
    return None, f"{stem}bias" if stem != weight.name else None


def _along(value: Value, dim: int, width: Widths) -> Width:
    return width(value.labels.movedim(dim, 0).flatten(1)[:, 0], value.shape[dim])


class Layer(Operation):
    layer = True


@_registered("linear")
class Linear(Layer):
    """Reads and writes units along the last dimension."""

    def parts(self, step: Step) -> tuple[Value, Weight, Weight | None, str | None]:
        """The input, the weight (outputs, inputs), the bias, and where a constant would go."""
        weight, source = step.weight("weight"), step.value("input")
        assert weight is not None
        assert source is not None
        return source, weight, *_bias(step, weight)

    def follow(self, step: Step) -> Value:
        source, weight, bias, name = self.parts(step)
        last = len(step.shape) - 1
        step.read("linear", source, len(source.shape) - 1, weight, 1, name)
        return step.written(step.rows("linear", weight, 0, bias), last)

    def products(self, step: Step, width: Widths) -> Iterator[Product]:
        source, output = self.parts(step)[0], step.walk.values[step.node]
        last = len(output.shape) - 1
        yield Product(
            positions(output.shape[:-1]),
            _along(output, last, width),
            _along(source, len(source.shape) - 1, width),
        )


def _turned(weight: Weight) -> Weight:
    mask = None if weight.mask is None else _turned(weight.mask)
    return replace(weight, dims=weight.dims[::-1], mask=mask)


@_registered("addmm")
class AddMM(Linear):
    """bias + input @ weight, with a weight (inputs, outputs)."""

    def parts(self, step: Step) -> tuple[Value, Weight, Weight | None, str | None]:
        weight, source = step.weight("mat2"), step.value("mat1")
        if step.number("beta") != 1 or step.number("alpha") != 1:
            raise Unsupported(f"{step} scales what it adds")
        assert weight is not None
        assert source is not None
        return source, _turned(weight), *_bias(step, weight, "self")


@_registered("conv1d conv2d conv3d")
class Convolution(Layer):
    """Reads and writes channels, the first dimension after the batch.

    The groups of a grouped convolution live and die as wholes, the channels that they read with
    those that they write: of a depthwise one, each channel on its own.
    """

    transposed = False

    def follow(self, step: Step) -> Value:
        source, weight = step.value("input"), step.weight("weight")
        assert source is not None
        assert weight is not None
        if len(step.shape) != len(weight.shape):
            raise Unsupported(f"{step} runs on an input without a batch dimension")
        bias, name = _bias(step, weight)
        groups = step.number("groups")
        out, into = (1, 0) if self.transposed else (0, 1)
        if groups == 1:
            step.read("conv", source, 1, weight, into, name, self.pads(step, weight))
            return step.written(step.rows("conv", weight, out, bias), 1)
        if weight.mask is not None:
            raise Unsupported(f"the weight of {step} is masked")
        rows = step.rows("conv", weight, 0).reshape(groups, -1)
        incoming = step.columns(source, 1).reshape(groups, -1)
        reason = f"some of the channels that {step} reads are no units"
        hidden = (incoming >= 0) & source.along(1)[1].isnan().any(1).expand(
            incoming.numel()
        ).reshape(incoming.shape)
        step.walk.atoms.block(
            incoming[hidden], f"{step} reads what depends on the data where a unit is excluded"
        )
        step.walk.tie(rows, rows[:, :1], reason)
        step.walk.tie(incoming, rows[:, :1], reason)
        outgoing = rows[:, :1].expand(-1, step.shape[1] // groups).reshape(-1)
        if not self.transposed:
            outgoing = rows.reshape(-1)
        if bias is not None:
            step.along_weight(bias, 0, outgoing, "row", step.owner(weight), "conv")
        return step.written(outgoing, 1)

    def pads(self, step: Step, weight: Weight) -> bool:
        """Whether it pads its input."""
        if self.transposed:
            return True  # even unpadded, fewer taps reach the borders than the middle
        padding = step.number("padding")
        if isinstance(padding, str):
            return padding != "valid" and any(size > 1 for size in weight.shape[2:])
        return any(padding)

    def products(self, step: Step, width: Widths) -> Iterator[Product]:
        source, output, weight = (
            step.value("input"),
            step.walk.values[step.node],
            step.weight("weight"),
        )
        assert source is not None
        assert weight is not None
        shape = (source if self.transposed else output).shape
        factor = shape[0] * positions(shape[2:]) * positions(weight.shape[2:])
        rows, columns = _along(output, 1, width), _along(source, 1, width)
        if step.number("groups") == 1:
            yield Product(factor, rows, columns)
        else:  # each channel meets those of its own group, which stays or goes as a whole
            channels = columns if self.transposed else rows
            yield Product(factor * weight.shape[1], channels, ONE)

    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        groups = step.number("groups")
        if groups == 1:
            return None
        value = step.walk.values[step.node]
        return {"groups": groups * removal.left_shape(value)[1] // value.shape[1]}


@_registered("conv_transpose1d conv_transpose2d conv_transpose3d")
class TransposedConvolution(Convolution):
    transposed = True


@_registered("embedding")
class Embedding(Layer):
    """Writes units along the last dimension."""

    def follow(self, step: Step) -> Value:
        weight, indices = step.weight("weight"), step.value("indices")
        assert weight is not None
        assert indices is not None
        step.walk.atoms.block(indices.labels, f"{step} takes them as numbers of its rows")
        return step.written(step.rows("embedding", weight, 1), len(step.shape) - 1)


class Normalisation(Layer):
    """Normalises channels one by one, or several together.

    Its scale and shift belong to the rows of the units that it normalises: without them an excluded
    unit would not emit 0.
    """

    def follow(self, step: Step) -> Value:
        source = step.value("input")
        assert source is not None
        channels = self.together(step, step.columns(source, 1))
        for name in ("running_mean", "running_var"):
            if step.given.get(name) is not None:
                buffer = step.weight(name)
                assert buffer is not None
                step.walk.use(buffer.name, 0, channels, "buffer", step.layer, "norm")
        if step.given.get("weight") is None:
            labels = channels.reshape(-1, *[1] * (len(step.shape) - 2)).unsqueeze(0)
            return step.result(labels, step.emitted(full=True), source.open)
        weight, bias = step.weight("weight"), step.weight("bias")
        assert weight is not None
        rows = step.rows("norm", weight, 0, bias)
        step.walk.tie(rows, channels, f"some of the channels that {step} normalises are no units")
        return step.written(rows, 1)

    def together(self, step: Step, channels: Tensor) -> Tensor:
        return channels


@_registered("batch_norm instance_norm")
class BatchNormalisation(Normalisation):
    def follow(self, step: Step) -> Value:
        if step.given.get("training"):
            raise Unsupported(f"{step} has no running statistics: it mixes the batch's examples")
        return super().follow(step)


@_registered("group_norm")
class GroupNormalisation(Normalisation):
    def together(self, step: Step, channels: Tensor) -> Tensor:
        groups = channels.reshape(step.number("num_groups"), -1)
        first = groups[:, :1].expand_as(groups)
        step.walk.tie(groups, first, f"{step} normalises them together with what is no unit")
        return channels

    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        value = step.walk.values[step.node]
        left = removal.left_shape(value)[1]
        return {"num_groups": step.number("num_groups") * left // value.shape[1]}


@_registered("prelu")
class PReLU(Layer):
    """An activation with one slope for all units, or one each, which is part of the row."""

    def follow(self, step: Step) -> Value:
        source, weight = step.value("self"), step.weight("weight")
        assert source is not None
        assert weight is not None
        # An excluded unit's slope is 0 as well.
        emission = torch.where(source.emission < 0, 0, source.emission)
        if weight.tensor.numel() == 1:
            negative = (source.emission < 0) & (source.labels >= 0)
            emission = unknown(len(step.shape)) if negative.any() else emission
            return step.result(source.labels, emission, source.open)
        channels = step.columns(source, 1)
        rows = step.rows("norm", weight, 0)
        step.walk.tie(rows, channels, f"some of the channels that {step} takes are no units")
        return step.result(source.labels, emission, source.open)


@_registered("lstm gru rnn_tanh rnn_relu")
class Recurrent(Layer):
    """Units are the hidden ones: an excluded one stays 0 where it starts with 0.

    It has a row in every gate, and a column in the layer's own recurrence. Layers and directions
    are equally wide, so a unit has its rows in all of them.
    """

    def follow(self, step: Step) -> Any:
        name = str(step.node.target).partition(".")[2].partition(".")[0]
        gates = {"lstm": 4, "gru": 3}.get(name, 1)
        source = step.value("input")
        if source is None or "batch_sizes" in step.given:
            raise Unsupported(f"{step} runs on packed sequences")
        given = step.given["hx"]
        start = [
            step.walk.value(n) for n in (given if isinstance(given, list | tuple) else [given])
        ]
        weights = [step.walk.values[node] for node in step.given["params"]]
        if not all(isinstance(weight, Weight) for weight in weights):
            raise Unsupported(f"the weights of {step} are computed")
        directions = 1 + step.number("bidirectional")
        each = 4 if step.number("has_biases") else 2
        if len(weights) != step.number("num_layers") * directions * each:
            raise Unsupported(f"{step} projects its hidden units")
        hidden = weights[1].shape[1]
        owner = weights[0].name.rpartition(".")[0] or weights[0].name
        incoming = step.columns(source, 2)
        emission = compressed(source.along(2)[1].expand(len(incoming), -1))
        step.walk.mark(source)
        units: Tensor | None = None
        for place in range(0, len(weights), each):
            into, back, *shifts = weights[place : place + each]
            rows = step.rows("recurrent", into, 0, back, *shifts, owner=owner)
            units = rows[:hidden] if units is None else units
            step.walk.atoms.tie(rows, units.repeat(gates))
            if place >= directions * each:
                incoming, emission = units.repeat(directions), torch.zeros(1, 1)
            bias = shifts[0].name if shifts else None
            step.read_units("recurrent", incoming, emission, into, 1, bias, owner=owner)
            step.read_units("recurrent", units, torch.zeros(1, 1), back, 1, bias, owner=owner)
            step.walk.marked.append(rows)
        assert units is not None
        if any(bool((value.emission != 0).any()) for value in start):
            step.walk.atoms.block(units, f"{step} starts with states that are not 0")
        outputs = []
        for place, output in enumerate(step.output):
            rank = output.ndim
            labels = (units.repeat(directions) if place == 0 else units).reshape(
                [1] * (rank - 1) + [-1]
            )
            zero = torch.zeros([1] * rank, dtype=output.dtype)
            outputs.append(Value(shape_of(output), labels, zero, units))
        for value in start:  # as wide as the units
            step.walk.tie(
                value.labels, outputs[-1].labels, f"{step} starts with states that belong to none"
            )
        return tuple(outputs)


# -- operations that leave every entry where it is -----------------------------------------------


class Pointwise(Operation):
    """An operation on single entries of one tensor, or a copy of it."""

    def follow(self, step: Step) -> Value:
        return step.result(step.source.labels, step.emitted(), step.source.open)


register(
    *_named(
        "relu relu6 leaky_relu elu selu celu gelu silu mish softplus softshrink hardshrink "
        "tanh hardtanh hardsigmoid hardswish sigmoid log_sigmoid threshold sin cos tan asin "
        "acos atan sinh cosh asinh acosh atanh exp exp2 expm1 log log2 log10 log1p erf erfc "
        "erfinv abs neg negative sign sgn sqrt rsqrt square reciprocal floor ceil round "
        "trunc frac clamp clip clamp_min clamp_max nan_to_num clone contiguous detach alias "
        "lift_fresh_copy lift_fresh lift type_as to _to_copy logit rad2deg deg2rad "
        "logical_not bitwise_not isnan isinf isfinite positive sinc erf special_erf digamma "
        "lgamma hardshrink angle real float double half"
    ),
    operation=Pointwise(),
)


@_registered("dropout alpha_dropout feature_dropout feature_alpha_dropout")
class Passing(Pointwise):
    """Nothing happens in eval mode."""

    def follow(self, step: Step) -> Value:
        if step.number("train"):
            raise Unsupported(f"{step} drops units at random in eval mode too")
        return Value(step.shape, step.source.labels, step.source.emission, step.source.open)


class Elementwise(Operation):
    """An operation on the entries of several tensors: units that meet are tied.

    A factor that several units share is no tie: it scales units that emit 0 when excluded. What
    belongs to no unit and is as long as there are units cannot become shorter, so the units that
    meet different parts of it are tied.
    """

    def follow(self, step: Step) -> Any:
        masked = self.masked(step)
        return masked or self.combined(step, step.inputs)

    def masked(self, step: Step) -> Weight | None:
        """A weight times a mask, which is a weight as far as layers are concerned."""
        return None

    def combined(self, step: Step, values: Sequence[Value]) -> Value:
        given = values
        values = [_aligned(value, len(step.shape)) for value in values]
        if len(values) > 1:
            values = self.without_shared(step, values)
        step.met = {id(value): met for value, met in zip(given, values, strict=True)}
        if len(values) == 1:
            return step.result(values[0].labels, self.emission(step, values), values[0].open)
        labels = torch.full([1] * len(step.shape), KEPT)
        for value in values:
            mine = self.with_fixed(step, value, values)
            first, second = torch.broadcast_tensors(labels, mine)
            both = (first >= 0) & (second >= 0)
            step.walk.atoms.tie(first[both], second[both])
            labels = torch.where(first >= 0, first, second)
        return step.result(compressed(labels), self.emission(step, values), self.open(values))

    def without_shared(self, step: Step, values: list[Value]) -> list[Value]:
        """Units that meet several others are none that could go with them."""
        found = []
        for value in values:
            spans = [
                dim
                for dim in range(len(step.shape))
                if value.shape[dim] == 1 and step.shape[dim] > 1
            ]
            if value.units and any(
                other.units and step.walk.varies(other.labels, spans)
                for other in values
                if other is not value
            ):
                reason = f"{step} combines units with what is shared by several of them"
                step.walk.atoms.block(value.labels, reason)
                rank = len(step.shape)
                value = Value(value.shape, torch.full([1] * rank, KEPT), unknown(rank))
            found.append(value)
        return found

    def with_fixed(self, step: Step, value: Value, values: Sequence[Value]) -> Tensor:
        """The labels of a value where it meets what cannot become shorter."""
        labels = value.labels
        for other in values:
            if other is value or not value.units:
                continue
            reason = f"{step} combines units with what is none"
            long = [
                dim
                for dim in range(len(step.shape))
                if other.shape[dim] > 1 and labels.shape[dim] > 1
            ]
            if not long:
                continue
            if not other.units:
                labels = step.walk.tied_along(labels, long, reason)
            elif bool((other.labels < 0).any()):
                first, second = torch.broadcast_tensors(labels, other.labels)
                step.walk.atoms.block(first[second < 0], reason)
                labels = torch.where(second < 0, KEPT, first)
        return labels

    def emission(self, step: Step, values: Sequence[Value]) -> Tensor:
        if step.output.is_floating_point() or not any(
            bool(value.emission.isnan().any()) for value in values
        ):
            try:
                return compressed(step.call(lambda v: self.met(step, v).emission.clone()))
            except (RuntimeError, TypeError):  # NaN is no integer
                pass
        return unknown(len(step.shape))

    def met(self, step: Step, value: Value) -> Value:
        """An input as it was taken, aligned to the output."""
        return step.met.get(id(value)) or _aligned(value, len(step.shape))

    def open(self, values: Sequence[Value]) -> Tensor:
        return torch.cat([value.open for value in values])


def _aligned(value: Value, rank: int) -> Value:
    """With leading dimensions of size 1, as broadcasting adds them."""
    lead = [1] * (rank - value.labels.ndim)
    return Value(
        torch.Size([*lead, *value.shape]),
        value.labels.reshape([*lead, *value.labels.shape]),
        value.emission.reshape([*lead, *value.emission.shape]),
        value.open,
    )


register(
    *_named(
        "add sub subtract rsub pow maximum minimum fmax fmin atan2 remainder fmod "
        "floor_divide hypot lerp addcdiv copysign eq ne lt le gt ge logical_and logical_or "
        "logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ isclose xlogy"
    ),
    *(aten.max.other, aten.min.other),
    operation=Elementwise(),
)


def _silent(value: Value) -> bool:
    """Whether every unit of a value emits 0 when it is excluded."""
    return value.units and not bool(((value.emission != 0) & (value.labels >= 0)).any())


@_registered("mul multiply")
class Product_(Elementwise):
    """A product: 0 where one factor is, whatever the other."""

    def masked(self, step: Step) -> Weight | None:
        found = [step.walk.values.get(node) for node in step.node.all_input_nodes]
        if len(found) != 2 or not all(isinstance(value, Weight) for value in found):
            return None
        weights: list[Any] = sorted(found, key=lambda w: w.name not in step.walk.parameters)
        weight, mask = weights
        fits = weight.shape == mask.shape and len(weight.shape) > 1
        plain = weight.mask is None and mask.mask is None
        trained = [value.name in step.walk.parameters for value in weights]
        return replace(weight, mask=mask) if fits and plain and trained == [True, False] else None

    def emission(self, step: Step, values: Sequence[Value]) -> Tensor:
        emission = super().emission(step, values)
        zero = torch.zeros([1] * emission.ndim, dtype=torch.bool)
        for value in values:
            zero = zero | (value.emission == 0)
        return compressed(torch.where(zero, 0, emission))

    def open(self, values: Sequence[Value]) -> Tensor:
        # A gate that is scaled does not scale what it lets through.
        return next((v.open for v in values if _silent(v)), values[-1].open)


@_registered("div divide true_divide")
class Quotient(Elementwise):
    """A quotient: 0 where the numerator is."""

    def emission(self, step: Step, values: Sequence[Value]) -> Tensor:
        emission = super().emission(step, values)
        if len(values) < 2 or step.node.args[0] not in step.walk.values:
            return emission
        top, bottom = values
        zero = (top.emission == 0) & (bottom.emission != 0)
        return compressed(torch.where(zero, 0, emission))

    def open(self, values: Sequence[Value]) -> Tensor:
        return values[0].open


@_registered("where masked_fill")
class Choice(Elementwise):
    """One of two values for each entry: known where both are the same."""

    def emission(self, step: Step, values: Sequence[Value]) -> Tensor:
        mask = step.value("condition" if "condition" in step.given else "mask")
        assert mask is not None
        if not mask.emission.isnan().any():
            return super().emission(step, values)
        names = ("self", "other") if "condition" in step.given else ("self", "value")
        both = []
        for name in names:
            value = step.value(name)
            if value is None:
                both.append(torch.tensor(float(step.number(name))))
            else:
                both.append(self.met(step, value).emission)
        first, second = torch.broadcast_tensors(*both)
        found = torch.where(first == second, first.to(second.dtype), torch.nan)
        return compressed(found.reshape([1] * (len(step.shape) - found.ndim) + list(found.shape)))


@_registered("addcmul")
class AddedProduct(Elementwise):
    def emission(self, step: Step, values: Sequence[Value]) -> Tensor:
        whole, *factors = values
        silent = [bool((factor.emission == 0).all()) for factor in factors]
        return whole.emission if any(silent) else super().emission(step, values)


@_registered("glu")
class GatedHalf(Elementwise):
    """Half of the entries times the sigmoid of the other half: unit for unit."""

    def follow(self, step: Step) -> Value:
        dim = step.number("dim")
        labels = step.source.full_labels().chunk(2, dim)
        emissions = step.source.full_emission().chunk(2, dim)
        halves = [
            Value(label.shape, compressed(label), compressed(emission), step.opened(label))
            for label, emission in zip(labels, emissions, strict=True)
        ]
        return self.combined(step, halves)

    def emission(self, step: Step, values: Sequence[Value]) -> Tensor:
        first, gate = (value.emission for value in values)
        return compressed(torch.where(first == 0, 0, first * gate.sigmoid()))

    def open(self, values: Sequence[Value]) -> Tensor:
        return values[0].open


# -- operations that mix entries along some dimensions -------------------------------------------


class Mixing(Operation):
    """Entries are mixed along some dimensions, along which units must not vary; others stay.

    Args:
        dims: these, of an input of so many dimensions, by the step.
        keeps: whether 0 everywhere stays 0, so that nothing has to be run.
    """

    def __init__(
        self, dims: Callable[[Step], Sequence[int]], does: str, keeps: bool = True
    ) -> None:
        self.dims, self.does, self.keeps = dims, does, keeps

    def follow(self, step: Step) -> Any:
        rank = len(step.source.shape)
        dims = sorted(dim % rank for dim in self.dims(step)) if rank else []
        reason = f"{step} {self.does} along the dimension of the units"
        labels = step.walk.tied_along(step.source.labels, dims, reason)
        outputs = step.output if isinstance(step.output, tuple | list) else (step.output,)
        if len(outputs[0].shape) < rank:
            for dim in reversed(dims):
                labels = labels.squeeze(dim)
        value = Value(shape_of(outputs[0]), labels, unknown(labels.ndim), step.source.open)
        if self.keeps and not bool((step.source.emission != 0).any()):
            zero = torch.zeros([1] * labels.ndim, dtype=step.source.emission.dtype)
            value = replace(value, emission=zero)
        elif len(outputs) == 1:
            return step.result(labels, step.emitted(full=True), step.source.open)
        if len(outputs) == 1:
            return value
        indices = [
            Value(shape_of(o), torch.full([1] * o.ndim, KEPT), unknown(o.ndim)) for o in outputs[1:]
        ]
        return (value, *indices)


def _spatial(count: int) -> Callable[[Step], Sequence[int]]:
    def dims(step: Step) -> Sequence[int]:
        rank = len(step.source.shape)
        if rank != count + 2:
            raise Unsupported(f"{step} works along the dimension of the units")
        return range(2, rank)

    return dims


for _count in (1, 2, 3):
    register(
        *_named(
            " ".join(
                f"{name}{_count}d"
                for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
            )
        ),
        *_named(f"max_pool{_count}d_with_indices lp_pool{_count}d"),
        operation=Mixing(_spatial(_count), "pools"),
    )
register(
    *_named(
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
        "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa"
    ),
    operation=Mixing(lambda step: range(2, len(step.source.shape)), "interpolates"),
)


def _given_dims(step: Step) -> Sequence[int]:
    dims = step.number("dim") if "dim" in step.given else None
    if isinstance(dims, int):
        return [dims]
    return list(dims) if dims else range(len(step.source.shape))


register(
    *(aten.mean, aten.sum, aten.amax, aten.amin, aten.cumsum, aten.max, aten.min, aten.nansum),
    *(aten.median, aten.norm, aten.linalg_vector_norm, aten.cummax),
    *(aten.sort, aten.topk, aten.kthvalue),
    operation=Mixing(_given_dims, "works"),
)
register(
    *(aten.softmax, aten.log_softmax, aten._softmax, aten.logsumexp, aten.var, aten.std),
    *(aten.prod, aten.cumprod, aten.logcumsumexp),
    operation=Mixing(_given_dims, "works", keeps=False),
)


@_registered("layer_norm rms_norm")
class NormalisationOverUnits(Operation):
    """Normalises the last dimensions: statistics over several units change when one of them goes.

    Where these dimensions lie within a unit, such as a head, its scale and shift are no unit's. An
    excluded unit then emits the shift.
    """

    def follow(self, step: Step) -> Value:
        source = step.value("input")
        assert source is not None
        count, rank = len(step.number("normalized_shape")), len(step.shape)
        reason = f"{step} normalises over several units: without one the others would change"
        labels = step.walk.tied_along(source.labels, range(rank - count, rank), reason)
        if source.units and not bool((labels >= 0).any()):
            for node in step.node.all_input_nodes:
                step.walk.failures.setdefault(str(node.target), reason)
        nothing = not bool((source.emission != 0).any()) and step.given.get("bias") is None
        zero = torch.zeros([1] * rank, dtype=step.output.dtype)
        # Its scale divides any factor of the rows out again.
        return Value(step.shape, labels, zero if nothing else unknown(rank), source.open[:0])


# -- operations that move entries ----------------------------------------------------------------


class Movement(Operation):
    """Entries move, or are copied: the labels move with them."""

    moves = True

    def follow(self, step: Step) -> Any:
        turned = self.turned(step)
        if turned is not None:
            return turned
        if not step.source.units and all(bool(v.emission.isnan().all()) for v in step.inputs):
            return step.kept()
        labels = self.moved(step, lambda value: value.full_labels())
        emissions = self.moved(step, lambda value: value.full_emission())
        if isinstance(labels, Tensor):
            opened = step.opened(labels)
            return Value(labels.shape, compressed(labels), compressed(emissions), opened)
        return tuple(
            Value(label.shape, compressed(label), compressed(emission), step.opened(label))
            for label, emission in zip(labels, emissions, strict=True)
        )

    def moved(self, step: Step, part: Callable[[Value], Tensor], call: Any = None) -> Any:
        """Where the entries of something about the inputs go; None if nobody knows.

        Args:
            part: of an input's true shape, or of what is left of it.
            call: the operation for what is left, see :meth:`.Step.call`.
        """
        # A view of what is laid out otherwise would not be one.
        return step.call(lambda value: part(value).contiguous(), call)

    def turned(self, step: Step) -> Weight | None:
        """A weight whose dimensions are only exchanged still is one."""
        return None


register(
    *_named(
        "flatten squeeze unsqueeze flip stack view_as reshape_as expand_as pixel_shuffle "
        "pixel_unshuffle roll repeat repeat_interleave tile channel_shuffle diagonal hstack "
        "vstack atleast_1d atleast_2d atleast_3d unsafe_chunk rot90 broadcast_to "
        "as_strided_copy unfold ravel"
    ),
    operation=Movement(),
)


@_registered("t transpose permute swapaxes movedim numpy_T mT swapdims")
class Turn(Movement):
    """Dimensions are exchanged."""

    def turned(self, step: Step) -> Weight | None:
        weight = step.walk.values.get(step.node.all_input_nodes[0])
        if not isinstance(weight, Weight):
            return None

        def order(part: Weight) -> tuple[int, ...]:
            rank = len(part.shape)
            # Sizes that tell the dimensions apart.
            probe = torch.empty([2 + dim for dim in range(rank)])
            return tuple(part.dims[size - 2] for size in step.call(lambda _: probe).shape)

        mask = weight.mask
        return replace(
            weight,
            dims=order(weight),
            mask=None if mask is None else replace(mask, dims=order(mask)),
        )


class Reshape(Movement):
    """Sizes are given as numbers."""

    def __init__(self, argument: str) -> None:
        self.argument = argument

    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        value, sizes = step.walk.values[step.node], list(step.given[self.argument])
        cut = removal.cut(value)
        if cut is None:
            return None
        lead = step.number("dim") % len(step.source.shape) if "dim" in step.given else 0
        place = cut[0] - lead
        if not 0 <= place < len(sizes) or sizes[place] == -1:
            return None
        if isinstance(sizes[place], fx.Node):
            # The batch's size times that of units: torch infers it, if the others are known.
            if -1 in sizes:
                inferred = sizes.index(-1)
                sizes[inferred] = value.shape[inferred + lead]
            sizes[place] = -1
        else:
            sizes[place] = len(cut[1])
        return {self.argument: sizes}


register(aten.view, aten.expand, aten._unsafe_view, operation=Reshape("size"))
register(aten.reshape, operation=Reshape("shape"))
register(aten.unflatten, operation=Reshape("sizes"))


@_registered("slice narrow")
class Slice(Movement):
    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        cut = removal.cut(step.source)
        dim = step.number("dim") % len(step.source.shape)
        if cut is None or cut[0] != dim:
            return None
        size, entries = step.source.shape[dim], cut[1]
        if "length" in step.given:
            start = step.number("start") % size
            stop = start + step.number("length")
        elif step.number("step") != 1:
            return None
        else:
            start, stop, _ = slice(step.number("start"), step.number("end")).indices(size)
        low = int((entries < start).sum())
        inside = int(((entries >= start) & (entries < stop)).sum())
        if "length" in step.given:
            return {"start": low, "length": inside}
        return {"start": low, "end": low + inside}


@_registered("select")
class Select(Movement):
    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        cut, dim = removal.cut(step.source), step.number("dim") % len(step.source.shape)
        if cut is None or cut[0] != dim:
            return None
        place = step.number("index") % step.source.shape[dim]
        return {"index": int((cut[1] < place).sum())}


@_registered("chunk split split_with_sizes tensor_split unsafe_split unbind")
class Split(Movement):
    """Several parts; once units are gone, of sizes of their own."""

    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        cut = removal.cut(step.source)
        dim = step.number("dim") % len(step.source.shape)
        if cut is None or cut[0] != dim or "unbind" in str(step.node.target):
            return None
        parts = step.walk.values[step.node]
        sizes = [0 if removal.empty(part) else removal.left(part).shape[dim] for part in parts]
        return {
            "target": aten.split_with_sizes.default,
            "args": (step.node.args[0], sizes, dim),
        }


@_registered("cat concat concatenate")
class Join(Movement):
    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        (name,) = [key for key in step.given if key != "dim"]
        nodes = step.given[name]
        left = [node for node in nodes if not removal.empty(step.walk.value(node))]
        return None if len(left) == len(nodes) else {name: left}


@_registered("index_select index gather take_along_dim")
class Index(Movement):
    """Entries are taken by their numbers, which are no units."""

    def follow(self, step: Step) -> Any:
        source, *indices = step.inputs
        for value in indices:
            step.walk.atoms.block(value.labels, f"{step} takes them as numbers of entries")
        if any(bool(value.emission.isnan().any()) for value in indices):
            return self.anywhere(step, source, indices)
        labels = self.moved(step, lambda value: value.full_labels())
        emission = self.moved(step, lambda value: value.full_emission())
        opened = step.opened(labels)
        return Value(step.shape, compressed(labels), compressed(emission), opened)

    def moved(self, step: Step, part: Callable[[Value], Tensor], call: Any = None) -> Any:
        source, *indices = step.inputs
        if any(bool(value.emission.isnan().any()) for value in indices):
            return None  # units do not vary along what is indexed

        def argument(value: Value) -> Tensor:
            return (part(value) if value is source else value.full_emission()).contiguous()

        return step.call(argument, call)

    def anywhere(self, step: Step, source: Value, indices: Sequence[Value]) -> Value:
        """Nobody knows which entries: units must not vary along what is indexed."""
        given = step.given.get("indices")
        if given is None:
            dims = [step.number("dim") % len(source.shape)]
            labels = step.walk.tied_along(source.labels, dims, f"{step} indexes units")
            return Value(step.shape, labels, self.same(source, labels), source.open)
        dims = [dim for dim, node in enumerate(given) if node is not None]
        labels = step.walk.tied_along(source.labels, dims, f"{step} indexes units")
        if dims != list(range(dims[0], dims[-1] + 1)):
            step.walk.atoms.block(labels, f"{step} indexes several dimensions")
            return step.kept()
        # The indices' own dimensions take the place of those that they index.
        count = len(step.shape) - len(source.shape) + len(dims)
        sizes = [*labels.shape[: dims[0]], *[1] * count, *labels.shape[dims[-1] + 1 :]]
        labels = labels.reshape(sizes)
        return Value(step.shape, labels, self.same(source, labels), source.open)

    def same(self, source: Value, labels: Tensor) -> Tensor:
        """What is emitted, where that is the same number everywhere."""
        one = source.emission.reshape(-1)
        rank = labels.ndim
        alike = not bool((one != one[:1]).any()) and bool((labels >= 0).all())
        return one[:1].reshape([1] * rank) if alike else unknown(rank)


@_registered("pad constant_pad_nd zero_pad2d")
class Padding(Movement):
    """Adds entries at the borders.

    Around the units they belong to whom they surround. In the dimension of the units themselves
    they are new ones without parameters, which a shortcut needs that has fewer channels than what
    it is added to.
    """

    def follow(self, step: Step) -> Value:
        source, sizes = step.source, list(step.number("pad"))
        constant = step.given.get("mode", "constant") == "constant"
        labels, rank = source.labels, len(source.shape)
        for place, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
            dim = rank - 1 - place
            if (before or after) and labels.shape[dim] > 1:
                if min(before, after) < 0 or not constant:
                    raise Unsupported(f"{step} pads along the dimension of the units")
                shape, parts = list(labels.shape), []
                for count in (before, after):
                    new = step.walk.atoms.new(count, loose=True)
                    shape[dim] = count
                    line = new.reshape([-1 if d == dim else 1 for d in range(rank)])
                    parts.append(line.expand(shape))
                labels = torch.cat([parts[0], labels, parts[1]], dim)
        return step.result(labels, step.emitted(full=True), source.open)

    def moved(self, step: Step, part: Callable[[Value], Tensor], call: Any = None) -> Any:
        return None  # new entries have labels of their own, which running it does not give

    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        value, sizes = step.walk.values[step.node], list(step.number("pad"))
        cut = removal.cut(value)
        if cut is None:
            return None
        dim, entries = cut
        place = 2 * (len(value.shape) - 1 - dim)
        if place >= len(sizes) or not any(sizes[place : place + 2]):
            return None
        before, width = sizes[place], step.source.shape[dim]
        sizes[place] = int((entries < before).sum())
        sizes[place + 1] = int((entries >= before + width).sum())
        return {"pad": sizes}


class Factory(Operation):
    """A tensor of one number, of a size that may be that of units: its entries go with theirs."""

    layer = True
    largest = 2**14

    def __init__(self, argument: str | None) -> None:
        self.argument = argument

    def follow(self, step: Step) -> Value:
        shape, rank = step.shape, len(step.shape)
        number = step.call(lambda value: value.full_emission().nan_to_num()).reshape(-1)[:1]
        emission = number.reshape([1] * rank) if len(number) else torch.zeros([1] * rank)
        labels = torch.full([1] * rank, KEPT)
        like = step.inputs and self.argument is None
        if like:
            labels = step.source.labels
        elif step.output.is_floating_point() and rank and 1 < shape.numel() <= self.largest:
            labels = step.walk.atoms.new(shape.numel(), loose=True).reshape(shape)
        return Value(shape, labels, emission)

    def shrunk(self, step: Step, removal: Removal) -> dict[str, Any] | None:
        if self.argument is None:
            return None
        cut = removal.cut(step.walk.values[step.node])
        if cut is None:
            return None
        sizes = list(step.given[self.argument])
        sizes[cut[0]] = len(cut[1])
        return {self.argument: sizes}


register(
    *(aten.zeros, aten.ones, aten.full, aten.new_zeros, aten.new_ones, aten.new_full),
    operation=Factory("size"),
)
register(aten.zeros_like, aten.ones_like, aten.full_like, operation=Factory(None))


# -- operations that sum over units --------------------------------------------------------------


class Contraction(Operation):
    """A sum of products of two tensors.

    A dimension that both have and the result too is one of *many* products: where units lie along
    it, as heads do, everything in a product is one unit. Units along a dimension that is summed
    over go in pairs, if one of both emits 0; those along others remain what they are.
    """

    def letters(self, step: Step) -> tuple[list[str], list[Value], str]:
        """The names of the dimensions of both inputs, the inputs, those of the result."""
        first, second = step.inputs[:2]
        count = max(len(first.shape), len(second.shape), 2) - 2
        lead = "abcdefgh"[:count]
        left = "k" if len(first.shape) == 1 else lead[count - len(first.shape) + 2 :] + "ik"
        right = "k" if len(second.shape) == 1 else lead[count - len(second.shape) + 2 :] + "kj"
        out = lead + ("i" if len(first.shape) > 1 else "") + ("j" if len(second.shape) > 1 else "")
        return [left, right], [first, second], out

    def follow(self, step: Step) -> Value:
        names, values, out = self.letters(step)
        many = [c for c in out if all(c in name for name in names)]
        if any(
            step.walk.varies(value.labels, [name.index(c) for c in many])
            for name, value in zip(names, values, strict=True)
        ):
            return heads(step, names, values, many, out, values[-1].open)
        return self.free(step, names, values, out)

    def free(self, step: Step, names: list[str], values: list[Value], out: str) -> Value:
        """Of units that lie along no dimension of many products."""
        walk, reason = step.walk, f"{step} multiplies units with one another"
        # By operand, its units along each dimension.
        lines: list[dict[str, Tensor]] = []
        for name, value in zip(names, values, strict=True):
            dims = [c for i, c in enumerate(name) if walk.varies(value.labels, [i])]
            line = {}
            if len(dims) > 1:
                walk.atoms.block(value.labels, reason)
            elif value.units:
                c = dims[0] if dims else name[-1]
                line[c] = step.columns(value, name.index(c))
            lines.append(line)
        summed = [c for c in names[0] if c in names[1] and c not in out]
        for c in summed:
            sides = [line.pop(c, None) for line in lines]
            if all(side is None for side in sides):
                continue
            if any(side is None for side in sides):
                for side in sides:
                    if side is not None:
                        walk.atoms.block(side, f"{step} sums over units with what is none")
                continue
            left, right = sides
            assert left is not None
            assert right is not None
            walk.tie(left, right, f"{step} sums over units with what is none")
            zero = torch.zeros(len(left), dtype=torch.bool)
            for name, value in zip(names, values, strict=True):
                zero |= (value.along(name.index(c))[1] == 0).all(1).expand(len(left))
            walk.atoms.block(left[~zero], f"{step} sums over what excluded units emit")
            walk.mark(values[1])
            walk.paired.append(left)
        if all(lines):
            for line in lines:
                for labels in line.values():
                    walk.atoms.block(labels, reason)
            return step.kept()
        for line, value in zip(lines, values, strict=True):
            for c, labels in line.items():
                shape = [len(labels) if d == c else 1 for d in out]
                silent = not bool((value.emission != 0).any())
                emission = torch.zeros([1] * len(out), dtype=step.output.dtype)
                return Value(
                    step.shape,
                    labels.reshape(shape),
                    emission if silent else unknown(len(out)),
                    value.open,
                )
        return step.kept()

    def products(self, step: Step, width: Widths) -> Iterator[Product]:
        names, values, _out = self.letters(step)
        sizes: dict[str, int] = {}
        widths: dict[str, Width] = {}
        for name, value in zip(names, values, strict=True):
            for dim, c in enumerate(name):
                sizes[c] = max(sizes.get(c, 1), value.shape[dim])
                found = _along(value, dim, width)
                if found.units and value.shape[dim] > 1:
                    widths[c] = found
        factor = math.prod(size for c, size in sizes.items() if c not in widths)
        first, second = [*widths.values(), ONE, ONE][:2]
        if len(widths) <= 2:
            yield Product(factor, first, second)


def heads(
    step: Step,
    names: Sequence[str],
    values: Sequence[Value],
    many: Sequence[str],
    out: str,
    open_of: Tensor,
) -> Value:
    """Ties everything that belongs to one of many products."""
    reason = f"{step} multiplies units with one another"
    walk, tied = step.walk, []
    for name, value in zip(names, values, strict=True):
        inner = [dim for dim, c in enumerate(name) if c not in many]
        line = walk.tied_along(value.labels, inner, reason)
        line = line.permute([*(name.index(c) for c in many), *inner])
        size = dict(zip(many, line.shape, strict=False))
        tied.append(line.reshape([size.get(c, 1) for c in out]))
    along = [d for d, c in enumerate(out) if any(walk.varies(line, [d]) for line in tied)]
    labels = torch.full([1] * len(out), KEPT)
    silent = fixed = False
    for name, value, line in zip(names, values, tied, strict=True):
        sizes = [value.shape[name.index(out[d])] for d in along]
        if not value.units:
            fixed |= max(sizes) > 1
        elif min(sizes) == 1:
            walk.atoms.block(value.labels, f"{step} broadcasts one head over others")
        else:
            first, second = torch.broadcast_tensors(labels, line)
            if bool((first >= 0).any()):
                walk.tie(first, second, reason)
            labels = torch.where(first >= 0, first, second)
            silent |= _silent(value)
    if fixed:
        walk.atoms.block(labels, f"{step} combines heads with what is none")
    walk.attended.append(labels.reshape(-1))
    zero = torch.zeros([1] * len(out), dtype=step.output.dtype)
    return Value(step.shape, compressed(labels), zero if silent else unknown(len(out)), open_of)


@_registered("matmul mm bmm")
class Matrices(Contraction):
    """A product of matrices, of which one may be a weight: then it is a linear layer."""

    layer = True

    @staticmethod
    def _factors(step: Step) -> tuple[Any, Any]:
        values: Any = step.walk.values
        first, second = (values.get(node) for node in step.node.args[:2])
        return first, second

    def follow(self, step: Step) -> Value:
        _source, weight = self._factors(step)
        if isinstance(weight, Weight) and len(weight.shape) == 2 and len(step.inputs[0].shape) > 1:
            return self.linear(step, weight)
        return super().follow(step)

    def linear(self, step: Step, weight: Weight) -> Value:
        source, turned = self._factors(step)[0], _turned(weight)
        step.read("linear", source, len(source.shape) - 1, turned, 1, None)
        return step.written(step.rows("linear", turned, 0), len(step.shape) - 1)

    def products(self, step: Step, width: Widths) -> Iterator[Product]:
        source, weight = self._factors(step)
        if isinstance(weight, Weight):
            output = step.walk.values[step.node]
            last = len(output.shape) - 1
            yield Product(
                positions(output.shape[:-1]),
                _along(output, last, width),
                _along(source, len(source.shape) - 1, width),
            )
        else:
            yield from super().products(step, width)


@_registered("einsum")
class Einsum(Contraction):
    """A contraction that names its dimensions itself."""

    def letters(self, step: Step) -> tuple[list[str], list[Value], str]:
        given, _, out = step.given["equation"].replace(" ", "").partition("->")
        names, values = given.split(","), step.inputs
        plain = "." not in given and out and len(names) == len(values) == 2
        if not plain or any(len(set(name)) < len(name) for name in [*names, out]):
            raise Unsupported(f"{step} of {step.given['equation']!r} is not supported")
        return names, values, out

    def follow(self, step: Step) -> Value:
        given, _, out = step.given["equation"].replace(" ", "").partition("->")
        if "," not in given and set(given) == set(out) and "." not in given:
            order = [given.index(c) for c in out]
            source = step.source
            return Value(
                step.shape,
                source.labels.permute(order),
                source.emission.permute(order),
                source.open,
            )
        return super().follow(step)

    def products(self, step: Step, width: Widths) -> Iterator[Product]:
        if "," in step.given["equation"]:
            yield from super().products(step, width)


@_registered("scaled_dot_product_attention")
class Attention(Contraction):
    """Queries, keys and values of a head are one unit.

    Without heads, queries and keys stay, since their number is the scale; values go one by one.
    """

    def letters(self, step: Step) -> tuple[list[str], list[Value], str]:
        lead = "abcdefgh"[: len(step.shape) - 2]
        values = [step.value(name) for name in ("query", "key", "value")]
        return [f"{lead}{rest}" for rest in ("qi", "ki", "kj")], values, f"{lead}qj"  # type: ignore[return-value]

    def follow(self, step: Step) -> Value:
        if step.number("dropout_p"):
            raise Unsupported(f"{step} drops weights at random in eval mode too")
        names, values, out = self.letters(step)
        mask, many = step.value("attn_mask"), [c for c in out if c not in "qj"]
        if step.number("enable_gqa"):
            values = [_repeated(value, step.shape[-3]) for value in values]
        if len(step.shape) < 3:
            raise Unsupported(f"{step} runs on inputs without a batch dimension")
        if mask is not None:
            # All heads are masked alike, or a removed one would have to leave the mask as well.
            one = _aligned(mask, len(step.shape))
            line = [d for d, c in enumerate(out) if c in many]
            aligned = [v for v in values if step.walk.varies(v.labels, line)]
            if any(
                one.shape[d] > 1 and step.walk.varies(v.labels, [d]) for v in aligned for d in line
            ):
                raise Unsupported(f"{step} takes a mask for each head")
            step.walk.atoms.block(mask.labels, f"{step} takes them as a mask")
        lines = [[name.index(c) for c in many] for name in names]
        if any(step.walk.varies(v.labels, line) for v, line in zip(values, lines, strict=True)):
            # Only the values are multiplied; scaled queries and keys change where a head looks.
            found = heads(step, names, values, many, out, values[2].open)
            zero = torch.zeros([1] * len(out), dtype=step.output.dtype)
            silent = _silent(values[2])
            return replace(found, emission=zero if silent else unknown(len(out)))
        for value in values[:2]:
            step.walk.atoms.block(value.labels, f"{step} has one head, whose width is its scale")
        labels = step.columns(values[2], len(out) - 1)
        emission = unknown(len(out))
        if _silent(values[2]):
            emission = torch.zeros([1] * len(out), dtype=step.output.dtype)
        labels = labels.reshape([*[1] * (len(out) - 1), -1])
        return Value(step.shape, labels, emission, values[2].open)

    def products(self, step: Step, width: Widths) -> Iterator[Product]:
        query, key, _value = self.letters(step)[1]
        output = step.walk.values[step.node]
        tokens, inner = query.shape[-2:]
        summed, outer = key.shape[-2], output.shape[-1]
        lead = output.labels.reshape([*output.labels.shape[:-2], -1])[..., 0]
        names = [d for d in range(lead.ndim) if lead.shape[d] > 1]
        if names:
            line = lead.reshape(-1)
            everywhere = positions(output.shape[:-2]) // len(line)
            heads_left = width(line, len(line))
            yield Product(tokens * summed * (inner + outer) * everywhere, heads_left, ONE)
        else:
            each = tokens * summed * positions(output.shape[:-2])
            yield Product(each, _along(output, len(output.shape) - 1, width), ONE)


def _repeated(value: Value, count: int) -> Value:
    """Heads that several queries share, once for each."""
    times, shape = count // value.shape[-3], list(value.shape)
    shape[-3] = count

    def again(part: Tensor) -> Tensor:
        return part.repeat_interleave(times, -3) if part.shape[-3] > 1 else part

    return Value(torch.Size(shape), again(value.labels), again(value.emission), value.open)
