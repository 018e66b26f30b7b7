"""A training step's operations, written down once and run again without the Python around them.

A step of a small network is a few hundred operations of microseconds each, and as much time again
goes to Python, to effect handlers and to autograd's bookkeeping, which do the same in every step.
A :class:`Tape` has the operations of one step, those of the backward pass included, with the
parameters and buffers themselves as constants. Running it gives the same numbers as the step, to
the bit, from the same random state: operations and their order are the same.

:class:`Taped` decides when that may be done, and calls the function itself otherwise. What is
written down cannot depend on the numbers: Python that looks at them (``if loss > 1``) stops the
recording. Python that changes by itself from step to step cannot be seen, which is why the first
run of a tape is compared with the step, and again after anybody may have changed something.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import TensorMetadata

__all__ = ["Tape", "Taped"]

Function = Callable[..., Sequence[Tensor | None]]

_log = logging.getLogger(__name__)
_aten = torch.ops.aten
_SAME = {_aten.alias.default, _aten.detach.default}
"""Give what they are given, as other views may."""
_VIEWS = {
    *_SAME, _aten.slice.Tensor, _aten.select.int, _aten.permute.default, _aten.t.default,
    _aten.transpose.int, _aten.expand.default, _aten.view.default, _aten.unsqueeze.default,
    _aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default,
}  # fmt: skip
"""Of a tensor that stays are made once: they show the same memory."""
_IN_PLACE = {
    _aten.add.Tensor: (_aten.add_.Tensor, True), _aten.mul.Tensor: (_aten.mul_.Tensor, True),
    _aten.sub.Tensor: (_aten.sub_.Tensor, False), _aten.div.Tensor: (_aten.div_.Tensor, False),
    _aten.neg.default: (_aten.neg_.default, False), _aten.exp.default: (_aten.exp_.default, False),
    _aten.sqrt.default: (_aten.sqrt_.default, False),
}  # fmt: skip
"""Operations that can write over their first argument; whether any other can be the first."""
_FILLED = {
    _aten.full_like.default, _aten.ones_like.default, _aten.zeros_like.default,
    _aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default,
}  # fmt: skip
"""Read the shape and the type of their argument only."""
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default}
"""Have no numbers yet."""
_KEPT = 4096
"""Most numbers of a result that is kept, rather than computed again in every run."""
_WITH_NUMBERS = {*_IN_PLACE, *(operation for operation, _ in _IN_PLACE.values())}


class Tape:
    """The operations of a function of tensors; see `record`."""

    def __init__(self, graph: fx.GraphModule, fixed: Iterable[Tensor] = ()) -> None:
        self._constants = _prepare(graph, fixed)
        self._graph = graph
        self._run: Callable[..., Any] = type(graph).forward

    @classmethod
    def record(
        cls, function: Function, *inputs: Tensor, fixed: Iterable[Tensor] = ()
    ) -> tuple[Tape, Sequence[Tensor | None]]:
        """The tape of a call, and what the call gave.

        Args:
            function: gives tensors, or None among them. Whatever tensors it reads beside its
                arguments are constants of the tape, which sees what is written into them later.
            inputs: of the call; later ones have these shapes and types.
            fixed: constants whose numbers stay, too: what follows from them is computed once.

        Raises:
            RuntimeError: the function looks at the numbers in a tensor.
        """
        values: Sequence[Tensor | None] = ()

        def noted(*arguments: Tensor) -> Sequence[Tensor | None]:
            nonlocal values
            values = function(*arguments)
            return values

        with torch.enable_grad():
            graph = make_fx(noted)(*inputs)
        return cls(graph, fixed), [None if value is None else value.detach() for value in values]

    def __len__(self) -> int:
        """The number of operations."""
        return sum(node.op == "call_function" for node in self._graph.graph.nodes)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Sequence[Tensor | None]:
        """What the function gives, without a graph for gradients."""
        values: Sequence[Tensor | None] = self._run(self._graph, *inputs, *self._constants)
        return values


def _prepare(module: fx.GraphModule, fixed: Iterable[Tensor]) -> list[Tensor]:
    """Make the graph quick to run: constants and numbers are arguments, calls are short.

    What does nothing goes, what follows from fixed numbers is computed now, and memory that nothing
    reads any more is written over.

    Returns:
        The constants, in the order of the arguments that follow the inputs.
    """
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    kept: dict[fx.Node, Tensor] = {}
    places = {value.untyped_storage().data_ptr() for value in fixed}
    memory = _Memory(graph)
    for node in list(graph.nodes):
        if node.op == "get_attr":
            kept[node] = _attribute(module, node.target).detach()
        elif node.op != "call_function":
            continue
        elif node.target in _VIEWS and len(node.all_input_nodes) == 1 and node.args[0] in kept:
            kept[node] = node.target(kept[node.args[0]], *node.args[1:], **node.kwargs)
        elif memory.stays(node) and (value := _known(node, kept, places)) is not None:
            kept[node] = value
            places.add(value.untyped_storage().data_ptr())
        elif node.target in _SAME or (
            node.target in _VIEWS and _layout(node) == _layout(node.args[0]) is not None
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    arguments: dict[Any, fx.Node] = {}
    constants: list[Tensor] = []

    def argument(key: Any, value: Tensor) -> fx.Node:
        nonlocal last
        if key not in arguments:
            with graph.inserting_after(last):
                last = arguments[key] = graph.placeholder(f"constant_{len(constants)}")
            constants.append(value)
        return arguments[key]

    for node, value in kept.items():
        key = value.data_ptr(), value.dtype, value.shape, value.stride()
        node.replace_all_uses_with(argument(key, value))
    for node in reversed(list(kept)):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        # A number would be made a tensor of the other's type in every step.
        number = node.args[1] if node.target in _WITH_NUMBERS and len(node.args) == 2 else None
        found = node.meta.get("tensor_meta")
        if isinstance(number, int | float) and found is not None and found.dtype.is_floating_point:
            value = torch.tensor(number, dtype=found.dtype)
            node.args = (node.args[0], argument((number, found.dtype), value))
    read = [bool(node.users) for node in arguments.values()]
    for node in arguments.values():
        if not node.users:
            graph.erase_node(node)
    _reuse_memory(graph)
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _shorten(node)
    graph.lint()
    module.recompile()
    return [value for value, used in zip(constants, read, strict=True) if used]


class _Memory:
    """Which memory the nodes of a graph show, and until when it is used."""

    def __init__(self, graph: fx.Graph) -> None:
        self._place = {node: number for number, node in enumerate(graph.nodes)}
        self._shown: dict[fx.Node, set[fx.Node]] = {}  # the nodes that made what a node shows
        self._last: dict[fx.Node, int] = {}
        self._written: set[fx.Node] = set()
        for node in graph.nodes:
            given = set().union(*(self._shown[value] for value in node.all_input_nodes))
            for made in given:
                self._last[made] = self._place[node]
            if node.op != "call_function" or _makes_memory(node.target):
                self._shown[node] = {node}
            else:
                # What it says that it shows, or else all that it is given.
                named = [self._shown[value] for value in _aliased(node)]
                self._shown[node] = set().union(*named) if named else given
            given_away = node.all_input_nodes if node.op == "output" else ()
            for value in (*given_away, *_aliased(node, written=True)):
                self._written |= self._shown[value]

    def stays(self, node: fx.Node) -> bool:
        """Whether it is memory of its own that nobody writes to or is given."""
        return self._shown[node] == {node} and node not in self._written

    def free(self, node: fx.Node, at: fx.Node) -> bool:
        """Whether it is all of some memory that the graph made, which a node is the last to read.

        That node must see it in this way only: of a matrix and its transpose it cannot write over
        either.
        """
        made, *others = self._shown[node]
        seen = [value for value in at.all_input_nodes if made in self._shown[value]]
        return (
            not others
            and seen == [node]
            and made.op == "call_function"
            and _layout(made) == _layout(node) is not None
            and self._last[made] <= self._place[at]
        )


def _aliased(node: fx.Node, *, written: bool = False) -> list[fx.Node]:
    """The arguments that a node says that it shows, or writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    named = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    named |= node.kwargs
    found = [
        named.get(argument.name)
        for argument in schema.arguments
        if argument.alias_info is not None and (argument.alias_info.is_write or not written)
    ]
    return [value for value in found if isinstance(value, fx.Node)]


def _known(node: fx.Node, kept: dict[fx.Node, Tensor], places: set[int]) -> Tensor | None:
    """A small result of an operation, where it is the same in every run."""
    operation: Any = node.target
    found, given = node.meta.get("tensor_meta"), node.all_input_nodes
    if (
        not isinstance(found, TensorMetadata)
        or found.shape.numel() > _KEPT
        or torch.Tag.nondeterministic_seeded in operation.tags
        or operation in _EMPTY
    ):
        return None
    values: dict[fx.Node, Tensor] = {}
    for value in given:
        if value in kept and kept[value].untyped_storage().data_ptr() in places:
            values[value] = kept[value]
        elif operation in _FILLED and (layout := _layout(value)) is not None:
            shape, dtype, stride = layout
            values[value] = torch.empty_strided(shape, stride, dtype=dtype)
        else:
            return None
    arguments, options = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    result: Tensor = operation(*arguments, **options)
    return result


def _reuse_memory(graph: fx.Graph) -> None:
    """Write results over arguments that nothing reads any more, and that have the same shape."""
    memory = _Memory(graph)
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _IN_PLACE:
            continue
        operation, commutes = _IN_PLACE[node.target]
        first, *others = node.args
        orders = [node.args]
        if commutes and not node.kwargs:
            orders.append((*others, first))
        for order in orders:
            target = order[0]
            if (
                isinstance(target, fx.Node)
                and memory.free(target, node)
                and _layout(target) == _layout(node)
                and target not in order[1:]
            ):
                node.target, node.args = operation, tuple(order)
                break


def _layout(value: Any) -> Any:
    """Shape, type and strides of what a node gives, where that is a tensor."""
    found = value.meta.get("tensor_meta") if isinstance(value, fx.Node) else None
    return (found.shape, found.dtype, found.stride) if isinstance(found, TensorMetadata) else None


def _makes_memory(operation: Any) -> bool:
    """Whether what an operation gives is memory of its own."""
    schema = getattr(operation, "_schema", None)
    if schema is None or operation in (_aten._unsafe_view.default, _aten._reshape_alias.default):
        return False  # the two are views that do not say so
    values = [*schema.arguments, *schema.returns]
    return bool(schema.returns) and all(value.alias_info is None for value in values)


def _attribute(module: Any, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    value: Tensor = module
    return value


def _shorten(node: fx.Node) -> None:
    """Call the function that Python code calls for an operation, where there is one.

    It does the same, but understands its arguments a microsecond or two faster.
    """
    before, after = _layout(node.args[0]) if node.args else None, _layout(node)
    if node.target == _aten.slice.Tensor and before and after and len(node.args) == 4:
        arguments: Any = node.args
        value, dim, start, _ = arguments
        start = range(before[0][dim])[start:].start  # which may count from the end
        node.target, node.args = torch.narrow, (value, dim, start, after[0][dim])
    elif (
        node.target == _aten._to_copy.default
        and set(node.kwargs) == {"dtype"}
        and before
        and before[1] != node.kwargs["dtype"]
    ):
        node.target = torch.Tensor.to
    else:
        node.target = _short(node.target)


def _short(overload: Any) -> Any:
    """The function for an operation that has its name."""
    name = overload._schema.name.partition("::")[2]
    homes = (torch._C._VariableFunctions, torch._C._nn, torch._C._linalg)  # type: ignore[attr-defined]
    for home in (torch.Tensor,) if name.endswith("_") or name in ("expand", "view") else homes:
        if hasattr(home, name):
            return getattr(home, name)
    return overload


class Taped:
    """A function of tensors, from its tape as soon as there is one.

    Args:
        function: see :meth:`Tape.record`.
        module: has everything that the function reads and that lasts: its buffers may change in a
            call, its parameters not.
        after: calls with arguments of the same shapes before these are recorded, which costs as
            much as some hundred calls; at least one, which shows what a call writes to.

    Attributes:
        reason: why there is no tape, and will be none; None as long as there may be one.
    """

    def __init__(self, function: Function, module: nn.Module, *, after: int = 20) -> None:
        self._function, self._module, self._after = function, module, after
        self._calls: Counter[Any] = Counter()
        self._tapes: dict[Any, Tape] = {}
        self._trusted: set[Any] = set()
        self._doubted: set[Any] = set()
        self._unused: set[Any] = set()  # tapes that have not run since they were trusted
        self._never: set[Any] = set()
        self._places: list[Any] = []
        self._fixed: list[Tensor] = []  # the buffers whose numbers tapes have as constants
        self._versions: list[int] = []
        self._written: set[int] = set()  # buffers that calls have written to, by number
        self.reason: str | None = None

    def doubt(self) -> None:
        """Compare again before the next run of a tape: something may have been changed."""
        for key in self._trusted & self._unused:
            # Doubted before it saved anything, as a batch that comes once an epoch: not worth it.
            del self._tapes[key]
            self._never.add(key)
        self._doubted |= self._trusted
        self._trusted.clear()
        if self._tapes and self._places != self._where():
            self._tapes.clear()
            self._doubted.clear()
            self._calls.clear()

    def ready(self, *inputs: Tensor) -> bool:
        """Whether the next call with such arguments runs from a tape, or none ever will."""
        kind = _kind(inputs)
        return self.reason is not None or kind in self._trusted or kind in self._never

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor | None]:
        key = _kind(inputs)
        if self.reason is not None or key in self._never:
            return self._function(*inputs)
        if self._tapes and self._versions != [value._version for value in self._fixed]:
            self.doubt()
        tape = self._tapes.get(key)
        if tape is not None and key not in self._trusted:
            return self._compared(key, tape, inputs)
        if tape is not None:
            self._unused.discard(key)
            return tape(*inputs)
        self._calls[key] += 1
        if self._calls[key] <= self._after:
            if self._calls[key] > 1:
                return self._function(*inputs)
            buffers = self._buffers()
            values = self._function(*inputs)
            now = enumerate(zip(buffers, self._buffers(), strict=True))
            self._written |= {number for number, (one, other) in now if one != other}
            return values
        before = self._state()
        try:
            numbered = enumerate(self._module.buffers())
            fixed = [value for number, value in numbered if number not in self._written]
            tape, values = Tape.record(self._function, *inputs, fixed=fixed)
        except Exception as error:  # whatever a model's Python may do while it is recorded
            self._give_up(f"{type(error).__name__}: {error}")
            self._restore(before)
            return self._function(*inputs)
        self._tapes[key], self._places = tape, self._where()
        self._fixed, self._versions = fixed, [value._version for value in fixed]
        return values

    def _compared(self, key: Any, tape: Tape, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """One call by both ways, from the same state."""
        before = self._state()
        try:
            # Not the numbers themselves, or two generations of gradients would lie there.
            own = _digests([*tape(*inputs), *self._state()])
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
            own = []
        self._restore(before)
        values = self._function(*inputs)
        if self.reason is None:
            if own == _digests([*values, *self._state()]):
                self._trusted.add(key)
                self._unused.add(key)
            elif key in self._doubted:  # a step is another one now, and can be recorded anew
                del self._tapes[key]
                self._doubted.remove(key)
                self._calls[key] = 0
            else:
                self._give_up("running the recorded operations did not give what the step gives")
        return values

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._tapes.clear()
        _log.info("steps run without a tape: %s", reason)

    def _state(self) -> list[Tensor]:
        """What a call changes: the random state and some of the buffers."""
        return [torch.get_rng_state(), *(value.clone() for value in self._moving())]

    def _restore(self, state: list[Tensor]) -> None:
        random, *buffers = state
        torch.set_rng_state(random)
        for value, kept in zip(self._moving(), buffers, strict=True):
            value.copy_(kept)

    def _buffers(self) -> list[Any]:
        """What tells whether a call writes to them: other numbers, or the same ones again."""
        buffers = list(self._module.buffers())
        return list(zip(_digests(buffers), (value._version for value in buffers), strict=True))

    def _moving(self) -> list[Tensor]:
        buffers = enumerate(self._module.buffers())
        return [value for number, value in buffers if number in self._written]

    def _where(self) -> list[Any]:
        """The tensors that a tape has as constants, their memory, and versions of their numbers."""
        moving = {id(value) for value in (*self._module.parameters(), *self._moving())}
        tensors = [*self._module.parameters(), *self._module.buffers()]
        return [
            (id(value), value.data_ptr(), None if id(value) in moving else value._version)
            for value in tensors
        ]


def _kind(inputs: Sequence[Tensor]) -> Any:
    return tuple((value.shape, value.dtype) for value in inputs)


def _digests(values: Iterable[Tensor | None]) -> list[bytes | None]:
    """Digests of all bits of each."""
    found: list[bytes | None] = []
    for value in values:
        if value is None:
            found.append(None)
            continue
        numbers: Any = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        found.append(hashlib.blake2b(numbers).digest())
    return found
