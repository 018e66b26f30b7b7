"""What each operation does to the units that pass through it: one rule an operation.

A rule is a function of a :class:`Step` (one node of the traced graph) that returns the
:class:`~pyro_sparse.graph.units.Value` of the node's output. It may write rows (:meth:`Step.rows`),
read columns (:meth:`Step.read`), tie units, or raise :class:`Unsupported`, which blocks all units
that come in. An operation without a rule is unsupported, so a missing rule costs sparsity, never
correctness.

There are few kinds of rules, and most operations are one line in a list:

* *layers* read columns of a weight and write rows;
* *pointwise* operations keep every entry where it is; where several tensors meet, their units are
  tied (an addition) or one multiplies the other (a gate);
* *channelwise* operations (pooling, interpolation, softmax, mean) mix entries along some
  dimensions, along which units must not vary;
* *movements* (flatten, permute, concatenation, slices, ...) are run on the labels;
* *contractions* (matrix products, attention) make a unit of what they sum over: a head.

To add one, write the function and register it for the module classes, functions and tensor
methods that it covers: ``@rule(nn.ReLU, torch.relu, "relu")``. Module classes match exactly, since
a subclass may compute something else.

What an excluded unit emits is computed, not assumed: the operations run on a tensor that holds, for
each entry, the value that it has when its unit is excluded (``Value.emission``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .units import KEPT, Atoms, Value, compressed

__all__ = [
    "MOVEMENTS",
    "RULES",
    "Read",
    "Rule",
    "Step",
    "Unsupported",
    "Use",
    "Walk",
    "argument",
    "rule",
    "rule_of",
]


class Unsupported(Exception):
    """Raised by a rule: the incoming units cannot be followed through this use of the operation."""


@dataclass(frozen=True)
class Use:
    """Units along dimension ``dim`` of a parameter or buffer.

    kind: ``"row"`` (it is part of the units' rows), ``"column"`` (it reads them) or ``"buffer"``.
    labels: ``(size of dim,)``.
    owner: the module, by its dotted name, or the parameter's own name.
    """

    name: str
    dim: int
    labels: Tensor
    kind: str
    owner: str


@dataclass(frozen=True)
class Read:
    """One time that a layer reads units.

    node: the layer.
    name, dim: the parameter that it reads with, and that parameter's dimension of columns.
    labels: atom of each column.
    emission: what its columns read from excluded units, ``(columns, entries)``, compressed.
    padded: whether the layer pads with zeros, so that a constant is not one at the borders.
    """

    node: fx.Node
    name: str
    dim: int
    labels: Tensor
    emission: Tensor
    padded: bool

    def constants(self) -> Tensor:
        """The constant of each column, ``(columns,)``; NaN where it is none that a bias can take.

        A bias imitates what is the same wherever it is read, and not cut off by zero padding.
        """
        emission = self.emission.expand(len(self.labels), -1)
        first = emission[:, 0].double()
        alike = (emission == emission[:, :1]).all(1) & ((first == 0) | (not self.padded))
        return first.where(alike, torch.nan)


@dataclass
class Walk:
    """What the rules find while the graph is walked.

    names: the first name of every parameter and buffer, by the identity of the tensor.
    values: the value of every node that is a tensor, or the values of one that is several.
    numbers: what every node returned for the example, where that is no tensor.
    sizes: labels that a number depends on, as it is the size of a dimension.
    """

    names: Mapping[int, str]
    atoms: Atoms = field(default_factory=Atoms)
    uses: list[Use] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    marked: list[Tensor] = field(default_factory=list)
    written: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    numbers: dict[fx.Node, Any] = field(default_factory=dict)
    sizes: dict[fx.Node, Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def use(self, tensor: Tensor, dim: int, labels: Tensor, kind: str, owner: str) -> None:
        """Units lie along a dimension of a parameter or buffer, which is one thing for all uses."""
        name = self.names[id(tensor)]
        for other in self.uses:
            if other.name != name:
                continue
            if other.dim == dim:
                self.tie(other.labels, labels, f"{name!r} is used for units that cannot be tied")
            elif other.kind == kind == "row":
                for part in (other.labels, labels):
                    self.atoms.block(part, f"{name!r} holds units along two of its dimensions")
        self.uses.append(Use(name, dim, labels, kind, owner))

    def tie(self, left: Tensor, right: Tensor, reason: str) -> None:
        """Tie label by label; what meets a kept entry is kept."""
        left, right = torch.broadcast_tensors(left, right)
        both = (left >= 0) & (right >= 0)
        self.atoms.tie(left[both], right[both])
        self.atoms.block(left[right < 0], reason)
        self.atoms.block(right[left < 0], reason)

    def mark(self, value: Value) -> None:
        """The units of ``value`` are read: what is open scales them."""
        self.marked.append(value.open)


@dataclass
class Step:
    """One node: the operation, what comes in, and what comes out.

    inputs: the values of its tensor inputs, in order.
    output: what it returned for the example.
    """

    node: fx.Node
    module: nn.Module | None
    walk: Walk
    inputs: Sequence[Value]
    output: Any

    def __str__(self) -> str:
        if self.module is not None:
            return f"{type(self.module).__name__} {self.node.target!r}"
        return f"'{getattr(self.node.target, '__name__', self.node.target)}'"

    @property
    def name(self) -> str:
        return str(self.node.target)

    @property
    def source(self) -> Value:
        return self.inputs[0]

    @property
    def shape(self) -> torch.Size:
        if not isinstance(self.output, Tensor):
            raise Unsupported(f"{self} returns more than one tensor, which is not supported")
        return self.output.shape

    def tensor(self, name: str) -> Tensor | None:
        """The module's parameter or buffer of this name."""
        value = getattr(self.module, name, None)
        return value if isinstance(value, Tensor) else None

    def call(self, substitute: Callable[[Value], Tensor]) -> Any:
        """The operation with each tensor input replaced."""

        def argument_of(node: fx.Node) -> Any:
            value = self.walk.values.get(node)
            if isinstance(value, Value):
                return substitute(value)
            if isinstance(value, tuple):
                return tuple(substitute(part) for part in value)
            return self.walk.numbers[node]

        args = fx.map_arg(self.node.args, argument_of)
        kwargs = fx.map_arg(self.node.kwargs, argument_of)
        if self.module is not None:
            return self.module(*args, **kwargs)
        if isinstance(self.node.target, str):
            return getattr(args[0], self.node.target)(*args[1:], **kwargs)
        return self.node.target(*args, **kwargs)

    def emitted(self, *, full: bool = False) -> Tensor:
        """The operation's output where every unit is excluded, compressed.

        :param full: run it on tensors of the true shapes, not only on what varies.
        """
        output = self.call(
            lambda value: (value.full_emission() if full else value.emission).clone()
        )
        return compressed(output)

    def value(self, labels: Tensor, emission: Tensor, open: Tensor | None = None) -> Value:
        """The output's value; units whose emission is not finite are blocked."""
        if open is None:
            open = torch.cat([value.open for value in self.inputs])
        finite = emission.isfinite() if emission.is_floating_point() else torch.tensor(True)
        if not finite.all():
            labels = self.refuse(
                labels,
                (~finite).expand(self.shape) & (labels >= 0).expand(self.shape),
                f"{self} maps what an excluded unit emits to a number not finite",
            )
        return Value(self.shape, labels, emission, open)

    def refuse(self, labels: Tensor, where: Tensor, reason: str) -> Tensor:
        """Block the units of some entries, and keep these entries."""
        if not where.any():
            return labels
        full = labels.expand(self.shape)
        self.walk.atoms.block(full[where], reason)
        return compressed(full.masked_fill(where, KEPT))

    def kept(self) -> Value:
        """An output without units."""
        rank = len(self.shape)
        return Value(
            self.shape, torch.full([1] * rank, KEPT), torch.zeros([1] * rank).to(self.output)
        )

    # -- layers ----------------------------------------------------------------------------------

    def rows(self, dim: int, *parameters: str, owner: str | None = None) -> Tensor:
        """Atoms of the rows that the module's parameters hold, one an entry of ``dim``.

        The first parameter's dimension ``dim``, and dimension 0 of the further ones.
        """
        first = self.tensor(parameters[0])
        assert first is not None
        key = (self.walk.names[id(first)], dim)
        if key not in self.walk.written:
            self.walk.written[key] = self.walk.atoms.new(first.shape[dim])
        atoms = self.walk.written[key]
        for i, parameter in enumerate(parameters):
            tensor = self.tensor(parameter)
            if tensor is not None:
                self.walk.use(tensor, 0 if i else dim, atoms, "row", owner or self.name)
        return atoms

    def columns(self, value: Value, dim: int) -> Tensor:
        """The units along ``dim`` of a value, ``(size,)``, whatever the other dimensions."""
        return self.walk.atoms.tie_along(
            value.along(dim)[0],
            f"{self} works along another dimension than that of the units",
        )

    def read(
        self, value: Value, dim: int, parameter: str, column: int, padded: bool = False
    ) -> None:
        """This module's ``parameter`` reads the units along ``dim`` by dimension ``column``."""
        tensor = self.tensor(parameter)
        assert tensor is not None
        labels = self.columns(value, dim)
        self.walk.use(tensor, column, labels, "column", self.name)
        emission = compressed(value.along(dim)[1].expand(len(labels), -1))
        name = self.walk.names[id(tensor)]
        self.walk.reads.append(Read(self.node, name, column, labels, emission, padded))
        self.walk.mark(value)

    def written(self, atoms: Tensor, dim: int) -> Value:
        """An output whose units along ``dim`` have just been written: excluded, they emit 0."""
        shape = [1] * len(self.shape)
        labels = atoms.reshape([*shape[:dim], len(atoms), *shape[dim + 1 :]])
        return Value(self.shape, labels, torch.zeros(shape).to(self.output), atoms.unique())


Rule: TypeAlias = Callable[[Step], Any]
RULES: dict[object, Rule] = {}
MOVEMENTS: set[Rule] = set()


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a rule for module classes, functions and names of tensor methods."""

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule for a node; None where there is none.

    Functions of packages that are not imported here are registered by their dotted names.
    """
    target = node.target if module is None else type(module)
    found = RULES.get(target)
    if found is None and callable(target):
        found = RULES.get(f"{target.__module__}.{getattr(target, '__name__', '')}")
    return found


def argument(step: Step, name: str, position: int, default: Any) -> Any:
    """A setting: the module's attribute, or the function's argument of this name or position."""
    if step.module is not None:
        return getattr(step.module, name, default)
    value = default
    if name in step.node.kwargs:
        value = step.node.kwargs[name]
    elif len(step.node.args) > position:
        value = step.node.args[position]
    return fx.map_arg(value, lambda node: step.walk.numbers.get(node))


# -- layers --------------------------------------------------------------------------------------


@rule(nn.Linear)
def linear(step: Step) -> Value:
    """Reads and writes units along the last dimension."""
    last = len(step.shape) - 1
    step.read(step.source, last, "weight", 1)
    return step.written(step.rows(0, "weight", "bias"), last)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def convolution(step: Step) -> Value:
    """Reads and writes channels, the first dimension after the batch.

    The groups of a grouped convolution live and die as wholes, the channels that they read with
    those that they write: of a depthwise one, each channel on its own.
    """
    module = step.module
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.modules.conv._ConvTransposeNd)
    if len(step.shape) != module.weight.ndim:
        raise Unsupported(f"{step} runs on an input without a batch dimension")
    if module.groups == 1:
        if module.transposed:
            # Even unpadded, fewer taps reach the borders than the middle.
            step.read(step.source, 1, "weight", 0, padded=True)
            return step.written(step.rows(1, "weight", "bias"), 1)
        padded = module.padding_mode == "zeros" and pads(module)
        step.read(step.source, 1, "weight", 1, padded)
        return step.written(step.rows(0, "weight", "bias"), 1)
    rows = step.rows(0, "weight").reshape(module.groups, -1)
    incoming = step.columns(step.source, 1).reshape(module.groups, -1)
    reason = f"some of the channels that {step} reads are no units"
    step.walk.tie(rows, rows[:, :1], reason)
    step.walk.tie(incoming, rows[:, :1], reason)
    outgoing = rows[:, :1].expand(-1, step.shape[1] // module.groups).reshape(-1)
    if not module.transposed:
        outgoing = rows.reshape(-1)
    if module.bias is not None:
        step.walk.use(module.bias, 0, outgoing, "row", step.name)
    return step.written(outgoing, 1)


def pads(module: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.modules.conv._ConvTransposeNd) -> bool:
    """Whether a convolution pads its input."""
    if isinstance(module.padding, str):
        return module.padding != "valid" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)


@rule(F.linear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm)
def function_of_parameters(step: Step) -> Value:
    """What :mod:`.functions` could not make a layer of."""
    raise Unsupported(
        f"{step} takes weights that are not parameters named 'weight' and 'bias', as a layer's are"
    )


@rule(F.batch_norm)
def batch_norm_of_parameters(step: Step) -> Value:
    """The same of a batch normalisation."""
    raise Unsupported(
        f"{step} is not behind a linear layer or convolution, or takes a scale and shift that are "
        "not parameters named 'weight' and 'bias', or no running statistics"
    )


@rule(nn.Embedding)
def embedding(step: Step) -> Value:
    """Writes units along the last dimension."""
    assert isinstance(step.module, nn.Embedding)
    if step.module.max_norm is not None:
        raise Unsupported(f"{step} renormalises its rows")
    step.walk.atoms.block(step.source.labels, f"{step} takes them as numbers of its rows")
    return step.written(step.rows(1, "weight"), len(step.shape) - 1)


NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


@rule(*NORMS)
def normalisation(step: Step) -> Value:
    """Normalises channels one by one, or, as a group normalisation, several together.

    Its scale and shift belong to the rows of the units that it normalises: without them an excluded
    unit would not emit 0.
    """
    module, channels = step.module, step.columns(step.source, 1)
    if isinstance(module, nn.GroupNorm):
        together = channels.reshape(module.num_groups, -1)
        first = together[:, :1].expand_as(together)
        step.walk.tie(together, first, f"{step} normalises them together with what is no unit")
    for name in ("running_mean", "running_var"):
        buffer = step.tensor(name)
        if buffer is not None:
            step.walk.use(buffer, 0, channels, "buffer", step.name)
    if step.tensor("weight") is None:
        labels = channels.reshape(-1, *[1] * (len(step.shape) - 2)).unsqueeze(0)
        return step.value(labels, step.emitted(full=True))
    rows = step.rows(0, "weight", "bias")
    step.walk.tie(rows, channels, f"some of the channels that {step} normalises are no units")
    return step.written(rows, 1)


@rule(nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
def normalisation_over_units(step: Step) -> Value:
    """Statistics over several units change when one of them goes."""
    raise Unsupported(f"{step} normalises over several units: without one the others would change")


@rule(nn.PReLU)
def prelu(step: Step) -> Value:
    """An activation with one slope for all units, or one each, which is part of the row."""
    if step.module.num_parameters == 1:  # type: ignore[union-attr]
        return step.value(step.source.labels, step.emitted())
    channels = step.columns(step.source, 1)
    rows = step.rows(0, "weight")
    step.walk.tie(rows, channels, f"some of the channels that {step} takes are no units")
    # An excluded unit's slope is 0 as well.
    return step.value(step.source.labels, step.source.emission.clamp(min=0), step.source.open)


@rule(nn.MultiheadAttention)
def multihead_attention(step: Step) -> Any:
    """Units are heads: their rows in the three projections, their columns in the last one."""
    module = step.module
    assert isinstance(module, nn.MultiheadAttention)
    nodes = [node for node in step.node.args[:3] if isinstance(node, fx.Node)]
    values: list[Value] = [step.walk.values[node] for node in nodes if node in step.walk.values]
    settings = {key: value for key, value in step.node.kwargs.items() if value is not None}
    allowed = {
        "need_weights": (True, False),
        "average_attn_weights": (True,),
        "is_causal": (False,),
    }
    unknown = [key for key, value in settings.items() if value not in allowed.get(key, ())]
    weights_used = any(
        user.target is not operator.getitem or (user.args[1] != 0 and user.users)
        for user in step.node.users
    )
    reason = ""
    if len(values) != 3 or len(step.node.args) != 3 or unknown:
        reason = f"{step} takes {', '.join(unknown) or 'inputs by name'}, which is not supported"
    elif module.bias_k is not None or module.add_zero_attn:
        reason = f"{step} adds keys of its own"
    elif not module._qkv_same_embed_dim:
        reason = f"{step} has keys or values of another width"
    elif weights_used:
        reason = f"the attention weights of {step} are used"
    output = step.output[0]
    inner = replace(step, output=output)
    if reason:
        step.walk.failures[step.name] = reason
        for given in step.inputs:
            step.walk.atoms.block(given.labels, reason)
        return (inner.kept(), None)
    for value in values:
        step.read(value, len(output.shape) - 1, "in_proj_weight", 1)
    rows = step.rows(0, "in_proj_weight", "in_proj_bias")
    heads = rows.reshape(3, module.num_heads, -1)
    step.walk.atoms.tie(heads, heads[:1, :, :1].expand_as(heads))
    attended = heads[2].reshape(-1)
    weight = module.out_proj.weight
    step.walk.use(weight, 1, attended, "column", step.name)
    name, nothing = step.walk.names[id(weight)], torch.zeros(1, 1).to(output)
    step.walk.reads.append(Read(step.node, name, 1, attended, nothing, padded=False))
    # Only the values are multiplied; scaled queries and keys change where a head looks.
    step.walk.marked.append(attended)
    projection = replace(inner, module=module.out_proj)
    written = projection.rows(0, "weight", "bias", owner=f"{step.name}.out_proj")
    return (inner.written(written, len(output.shape) - 1), None)


# -- operations that leave every entry where it is -----------------------------------------------


@rule(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanh, nn.Tanhshrink),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Sigmoid, nn.LogSigmoid, nn.Threshold),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus),
    *(F.softsign, F.softshrink, F.hardshrink, F.tanh, F.tanhshrink, F.hardtanh, F.hardsigmoid),
    *(F.hardswish, F.sigmoid, F.logsigmoid, F.threshold, F.relu_),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.selu, torch.sin, torch.cos, torch.exp),
    *(torch.abs, torch.neg, torch.sqrt, torch.rsqrt, torch.clamp, torch.square, torch.clone),
    *("relu", "relu_", "sigmoid", "tanh", "exp", "abs", "neg", "sqrt", "rsqrt", "clamp", "square"),
    *("contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "to", "type_as"),
    operator.neg,
)
def pointwise(step: Step) -> Value:
    """An operation on single entries of one tensor."""
    if overwrites(step.node, step.module):
        refuse_overwriting(step)
    return step.value(step.source.labels, step.emitted())


def refuse_overwriting(step: Step) -> None:
    """Refuse to overwrite memory that another node may read.

    Walks back to the operation that made the value, since what lies between may only be views.
    """
    node = step.node
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if len(node.users) > 1:
            raise Unsupported(f"{step} changes in place a value that is also used elsewhere")
        root = node.graph.owning_module
        module = root.get_submodule(str(node.target)) if node.op == "call_module" and root else None
        if rule_of(node, module) in FRESH and not overwrites(node, module):
            return


def overwrites(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation changes its first input."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    # Which position is "inplace" depends on the function; no other setting is ever True.
    settings = [*node.args[1:], node.kwargs.get("inplace", False)]
    named = str(getattr(node.target, "__name__", node.target)).endswith("_")
    return named or node.target in OVERWRITING or any(value is True for value in settings)


ELEMENTWISE = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.maximum, torch.minimum),
    *("add", "sub", "mul", "div", "pow", "add_", "sub_", "mul_", "div_"),
}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
OVERWRITING = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *("add_", "sub_", "mul_", "div_"),
}


@rule(*ELEMENTWISE)
def elementwise(step: Step) -> Value:
    """Arithmetic: the units of both sides are tied, entry by entry.

    A factor that several units share is no tie: it scales units that emit 0 when excluded.
    """
    target = step.node.target
    if target in OVERWRITING:
        refuse_overwriting(step)
    if len(step.inputs) == 1:
        return step.value(step.source.labels, step.emitted())
    left, right = step.inputs
    rank = len(step.shape)
    labels = [aligned(value.labels, rank) for value in (left, right)]
    shapes = [(1,) * (rank - len(value.shape)) + tuple(value.shape) for value in (left, right)]
    zero = [
        not bool(((value.emission != 0) & (value.labels >= 0)).any()) for value in (left, right)
    ]
    scaling = target in PRODUCTS or target in QUOTIENTS
    for this, other in ((0, 1), (1, 0)):
        spans = [
            dim
            for dim in range(rank)
            if shapes[other][dim] == 1 and step.shape[dim] > 1 and labels[this].shape[dim] > 1
        ]
        if not spans:
            continue
        reason = f"{step} combines units with what is shared by several of them"
        step.walk.atoms.block(labels[other], reason)
        if scaling and zero[this] and (this == 0 or target in PRODUCTS):
            emission = torch.zeros([1] * rank).to(step.output)
            return step.value(labels[this], emission, step.inputs[this].open)
        step.walk.atoms.block(labels[this], reason)
        return step.kept()
    first, second = torch.broadcast_tensors(*labels)
    reason = f"{step} combines units with what is none"
    step.walk.tie(first, second, reason)
    merged = torch.where((first >= 0) & (second >= 0), first, KEPT)
    opened = None
    if scaling:
        # A gate that is scaled does not scale what it lets through.
        opened = step.inputs[0 if zero[0] else 1].open
    return step.value(compressed(merged), step.emitted(), opened)


def aligned(labels: Tensor, rank: int) -> Tensor:
    """With leading dimensions of size 1, as broadcasting adds them."""
    return labels.reshape([1] * (rank - labels.ndim) + list(labels.shape))


@rule(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
@rule(
    "torchvision.ops.stochastic_depth.stochastic_depth",
    nn.FeatureAlphaDropout,
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
)
def passing(step: Step) -> Value:
    """Nothing happens in eval mode."""
    place = 3 if getattr(step.node.target, "__name__", "") == "stochastic_depth" else 2
    if step.module is None and argument(step, "training", place, True):
        raise Unsupported(f"{step} drops units at random in eval mode too")
    return step.value(step.source.labels, step.emitted())


# -- operations that mix entries along some dimensions -------------------------------------------


@rule(nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)
@rule(F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d, torch.max_pool1d)
def pooling_1d(step: Step) -> Value:
    """Pools over the last dimension."""
    return channelwise(step, range(2, 3), "pools")


@rule(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
@rule(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.max_pool2d)
def pooling_2d(step: Step) -> Value:
    """Pools over the last two dimensions."""
    return channelwise(step, range(2, 4), "pools")


@rule(nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)
@rule(F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d, torch.max_pool3d)
def pooling_3d(step: Step) -> Value:
    """Pools over the last three dimensions."""
    return channelwise(step, range(2, 5), "pools")


@rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate)
def interpolation(step: Step) -> Value:
    """Resamples all dimensions after the channels."""
    return channelwise(step, range(2, len(step.shape)), "interpolates")


def channelwise(step: Step, dims: range, does: str) -> Value:
    """Channels stay, whether or not what an excluded one emits still is the same everywhere."""
    if len(step.source.shape) != dims.stop or len(step.shape) != dims.stop:
        raise Unsupported(f"{step} {does} along the dimension of the units")
    return mixing(step, list(dims), does)


def mixing(step: Step, dims: Sequence[int], does: str) -> Value:
    """Entries are mixed along ``dims``, along which units must not vary; the others stay."""
    return step.value(without_variation(step, dims, does), step.emitted(full=True))


def without_variation(step: Step, dims: Sequence[int], does: str) -> Tensor:
    """The source's labels, of size 1 in ``dims``."""
    last = list(range(-len(dims), 0))
    front = step.source.labels.movedim(list(dims), last)
    outer = front.shape[: -len(dims)]
    reason = f"{step} {does} along the dimension of the units"
    labels = step.walk.atoms.tie_along(front.reshape(outer.numel(), -1), reason)
    return labels.reshape([*outer, *[1] * len(dims)]).movedim(last, list(dims))


@rule(nn.Softmax, nn.LogSoftmax, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax)
@rule("softmax", "log_softmax", torch.cumsum, "cumsum", F.normalize)
def along_one_dimension(step: Step) -> Value:
    """Mixes along one dimension, and keeps the shape."""
    dim = argument(step, "dim", 2 if step.node.target is F.normalize else 1, 1)
    if not isinstance(dim, int):
        raise Unsupported(f"{step} does not say along which dimension it works")
    return replace(mixing(step, [dim % len(step.shape)], "works"), open=step.source.open)


@rule(torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin")
def reduction(step: Step) -> Value:
    """Reduces some dimensions, along which units must not vary."""
    rank = len(step.source.shape)
    dims = argument(step, "dim", 1, None)
    dims = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    dims = sorted(dim % rank for dim in dims)
    labels = without_variation(step, dims, "works")
    if not argument(step, "keepdim", 2, False):
        for dim in reversed(dims):
            labels = labels.squeeze(dim)
    return step.value(labels, step.emitted(full=True))


# -- operations that move entries ----------------------------------------------------------------


def movement(*targets: object) -> None:
    """Register operations that only move entries, or copy them."""
    rule(*targets)(moving)


def moving(step: Step) -> Any:
    """Entries move: the labels move with them."""
    # A view of what is laid out otherwise would not be one.
    labels = step.call(lambda value: value.full_labels().contiguous())
    emissions = step.call(lambda value: value.full_emission().contiguous())
    opened = torch.cat([value.open for value in step.inputs])
    if isinstance(labels, Tensor):
        return Value(labels.shape, compressed(labels), compressed(emissions), opened)
    return tuple(
        Value(label.shape, compressed(label), compressed(emission), opened)
        for label, emission in zip(labels, emissions, strict=True)
    )


SHAPES = {"reshape", "view", torch.reshape, "expand", nn.Unflatten, "unflatten", torch.unflatten}
SPLITS = {"chunk", "split", torch.chunk, torch.split, "tensor_split", torch.tensor_split}
movement(nn.Flatten, torch.flatten, "flatten", *SHAPES, *SPLITS)
movement("permute", torch.permute, "transpose", torch.transpose, "swapaxes", torch.swapaxes)
movement("movedim", torch.movedim, "t", torch.t, "squeeze", torch.squeeze, "unsqueeze")
movement(torch.unsqueeze, torch.cat, torch.concat, torch.stack, "unbind", torch.unbind)
movement("flip", torch.flip, "expand_as", "view_as", "reshape_as", "index_select", nn.PixelShuffle)
movement("select", torch.select, "narrow", torch.narrow, F.pixel_shuffle)
PADS = (
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d),
    *(nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d),
    *(nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d),
)


@rule(operator.getitem)
def item(step: Step) -> Any:
    """An element of several tensors, or a part of one."""
    value = step.walk.values.get(step.node.args[0])  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return value[step.node.args[1]]  # type: ignore[index]
    return moving(step)


@rule(F.pad, *PADS)
def padding(step: Step) -> Value:
    """Adds entries at the borders.

    Around the units they belong to whom they surround. In the dimension of the units themselves
    they are new ones without parameters, which a shortcut needs that has fewer channels than what
    it is added to.
    """
    source, sizes = step.source, pad_sizes(step)
    labels = source.labels
    rank = len(source.shape)
    for i, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        dim = rank - 1 - i
        if (before or after) and labels.shape[dim] > 1:
            if min(before, after) < 0 or argument(step, "mode", 2, "constant") != "constant":
                raise Unsupported(f"{step} pads along the dimension of the units")
            if isinstance(step.module, nn.Module) and not isinstance(
                step.module, nn.ConstantPad1d | nn.ConstantPad2d | nn.ConstantPad3d
            ):
                raise Unsupported(f"{step} pads along the dimension of the units")
            shape = list(labels.shape)
            parts = []
            for count in (before, after):
                new = step.walk.atoms.new(count, loose=True)
                shape[dim] = count
                parts.append(
                    new.reshape([-1 if d == dim else 1 for d in range(rank)]).expand(shape)
                )
            labels = torch.cat([parts[0], labels, parts[1]], dim)
    return step.value(labels, step.emitted(full=True))


def pad_sizes(step: Step) -> list[int]:
    """How many entries are added before and after each dimension, the last one first."""
    sizes = argument(step, "padding" if step.module is not None else "pad", 1, ())
    return list(sizes)


# -- operations that sum over units --------------------------------------------------------------


@rule(torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm")
def matrix_product(step: Step) -> Value:
    """Products of many matrices, one a head: everything in a head is one unit."""
    if any(len(value.shape) < 3 for value in step.inputs):
        raise Unsupported(f"{step} multiplies units with one another")
    return heads(step, open_of=step.inputs[-1])


@rule(F.scaled_dot_product_attention)
def attention(step: Step) -> Value:
    """Queries, keys and values of a head are one unit."""
    if any(len(value.shape) < 3 for value in step.inputs[:3]):
        raise Unsupported(f"{step} runs on inputs without heads")
    if len(step.inputs) > 3:
        # All heads are masked alike, or a removed one would have to leave the mask as well.
        mask = step.inputs[3]
        units = bool(step.walk.atoms.firm(mask.labels).any())
        if units or (len(mask.shape) > 2 and mask.shape[-3] > 1):
            raise Unsupported(f"{step} takes a mask for each head")
        step.walk.atoms.block(mask.labels, f"{step} takes them as a mask")
        step = replace(step, inputs=step.inputs[:3])
    if argument(step, "dropout_p", 4, 0.0):
        raise Unsupported(f"{step} drops weights at random in eval mode too")
    # Only the values are multiplied; scaled queries and keys change where a head looks.
    return heads(step, open_of=step.inputs[2])


def heads(step: Step, open_of: Value) -> Value:
    """Ties everything that shares its leading dimensions (all but the last two)."""
    rank = len(step.shape)
    if any(value.shape[:-2] != step.shape[:-2] for value in step.inputs):
        raise Unsupported(f"{step} broadcasts one head over others")
    reason = f"{step} multiplies units with one another"
    tied = []
    for value in step.inputs:
        lead = list(value.labels.shape[:-2])
        rows = value.labels.reshape(torch.Size(lead).numel(), -1)
        tied.append(step.walk.atoms.tie_along(rows, reason).reshape([*lead, 1, 1]))
    labels = tied[0]
    for other in tied[1:]:
        first, second = torch.broadcast_tensors(labels, other)
        step.walk.tie(first, second, reason)
        labels = torch.where((first >= 0) & (second >= 0), first, KEPT)
    assert labels.ndim == rank
    return step.value(compressed(labels), step.emitted(full=True), open_of.open)


FRESH = {linear, convolution, normalisation, elementwise, matrix_product, attention, reduction}
FRESH |= {pointwise, prelu, pooling_1d, pooling_2d, pooling_3d, interpolation, embedding, padding}
FRESH |= {along_one_dimension, multihead_attention}
MOVEMENTS |= {moving, item, padding}
