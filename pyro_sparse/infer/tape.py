"""A training step's operations, written down once and run again without the Python around them.

A step of a small network is a few hundred operations of microseconds each, and as much time again
goes to Python, to effect handlers and to autograd's bookkeeping, which do the same in every step.
A :class:`Tape` has the operations of one step, those of the backward pass included, with the
parameters and buffers themselves as constants. Running it gives the same numbers as the step, to
the bit, from the same random state: operations and their order are the same.

What is written down must not depend on anything that a step may find changed. So a recording is
refused where Python looks at the numbers of *any* tensor (:class:`_Recorder`), where it changes
plain attributes of a module or draws random numbers of its own, and where it replaces a parameter
or a buffer instead of writing into it. :class:`Taped` decides when steps run from a tape, compares
the first run with a step, and notices when somebody else wrote to or replaced what a tape has as
constants. What it cannot see is Python that changes by itself outside the modules, a counter in a
closure for one, and does so in neither of the two steps that are compared.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Tape", "Taped"]

Function = Callable[..., Sequence[Tensor | None]]

_log = logging.getLogger(__name__)
_aten = torch.ops.aten
_SAME = {_aten.alias.default, _aten.detach.default}
"""Give what they are given, where nobody takes gradients."""
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_UNDISPATCHED = {
    "numpy", "tolist", "__array__", "__dlpack__", "storage", "untyped_storage", "_typed_storage",
    "__reduce_ex__", "__deepcopy__", "__repr__",
    "tensor_split", "ctc_loss", "_pack_padded_sequence",
}  # fmt: skip
"""Functions that look at numbers without an operation that could be seen."""


# -- what may not be recorded ----------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Writes operations down as they run, and refuses those of which numbers decide.

    Refused are operations whose result is a number for Python, or has a shape made of numbers, in
    whatever tensor they are.

    Attributes:
        graph: the operations so far; the inputs, and then the constants, are its placeholders.
        constants: tensors that are neither an input nor the result of an operation.
        found: the first that was refused, which stays when the function itself catches the error.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: list[Tensor] = []
        self.found: str | None = None
        self._placeholders: list[fx.Node] = []
        self._nodes = WeakTensorKeyDictionary()
        for value in inputs:
            self._nodes[value] = self._placeholder()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not {Tensor, nn.Parameter}.issuperset(types):  # may make other operations of this one
            return NotImplemented
        if _depends_on_numbers(func, args):
            self.refuse(str(func))
        kwargs = kwargs or {}
        if func in _SAME:
            result = func(*args, **kwargs)
            self._nodes[result] = self.node(args[0])
        elif func == _aten.lift_fresh.default:  # of a number that Python has: it is made anew
            fresh = self._constant(args[0].clone())
            result = func(*args, **kwargs)
            self._nodes[result] = self.graph.call_function(torch.clone, (fresh,))
        else:
            written = tree_map_only(Tensor, self.node, (args, kwargs))
            result = func(*args, **kwargs)
            self._note(result, self.graph.call_function(_short(func), *written))
        return result

    def refuse(self, what: str) -> None:
        self.found = self.found or f"Python looks at the numbers in a tensor, by {what}"
        raise RuntimeError(self.found)

    def node(self, value: Tensor) -> fx.Node:
        """What stands for a tensor, which is a constant where no operation has made it."""
        node: fx.Node | None = self._nodes.get(value)
        if node is None:
            node = self._nodes[value] = self._constant(value)
        return node

    def _note(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._nodes[result] = node
        elif isinstance(result, tuple | list):
            for place, one in enumerate(result):
                if one is not None:
                    self._note(one, self.graph.call_function(getitem, (node, place)))

    def _constant(self, value: Tensor) -> fx.Node:
        self.constants.append(value)
        return self._placeholder()

    def _placeholder(self) -> fx.Node:
        before = self._placeholders
        with self.graph.inserting_after(before[-1]) if before else nullcontext():
            before.append(self.graph.placeholder(f"given_{len(before)}"))
        return before[-1]


class _UndispatchedReads(TorchFunctionMode):
    """Refuses the functions that never reach :class:`_Recorder`."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in _UNDISPATCHED:
            self._recorder.refuse(func.__name__)
        return func(*args, **(kwargs or {}))


def _depends_on_numbers(operation: Any, args: tuple[Any, ...]) -> bool:
    if operation == _aten.index.Tensor:
        indices = [value for value in args[1] if value is not None]
        return any(value.dtype in (torch.bool, torch.uint8) for value in indices)
    # torch.equal gives a bool, but has no tag.
    return operation == _aten.equal.default or not _DATA_DEPENDENT.isdisjoint(operation.tags)


class _Python:
    """What Python may change in a call without a tensor, as it was.

    Attributes of modules that are numbers or words, and the generators of Python and NumPy.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes, *self._generators = self._now()

    def _now(self) -> list[Any]:
        kinds = bool | int | float | complex | str | None
        attributes = [
            {name: value for name, value in vars(one).items() if isinstance(value, kinds)}
            for one in self._module.modules()
        ]
        return [attributes, random.getstate(), np.random.get_state()]  # noqa: NPY002

    def changed(self) -> bool:
        # Words: the state of NumPy's has an array in it.
        return repr(self._now()) != repr([self._attributes, *self._generators])

    def restore(self) -> None:
        for one, attributes in zip(self._module.modules(), self._attributes, strict=False):
            vars(one).update(attributes)
        random.setstate(self._generators[0])
        np.random.set_state(self._generators[1])  # noqa: NPY002


# -- the recording ---------------------------------------------------------------------------------


class Tape:
    """The operations of a function of tensors; see `record`."""

    def __init__(self, graph: fx.Graph, constants: Iterable[Tensor]) -> None:
        for node in reversed(graph.nodes):
            if node.target is getitem and not node.users:
                graph.erase_node(node)
        self._graph = fx.GraphModule(nn.Module(), graph)
        self._constants = [value.detach() for value in constants]
        self._run: Callable[..., Any] = type(self._graph).forward

    @classmethod
    def record(cls, function: Function, *inputs: Tensor) -> tuple[Tape, Sequence[Tensor | None]]:
        """The tape of a call, and what the call gave.

        Args:
            function: gives tensors, or None among them. Whatever tensors it reads beside its
                arguments are constants of the tape, which sees what is written into them later.
            inputs: of the call; later ones have these shapes and types.

        Raises:
            RuntimeError: the function looks at the numbers in a tensor, any tensor.
        """
        # Each input a tensor of its own: one that is given twice may be two in a later call.
        first = {id(value): place for place, value in reversed([*enumerate(inputs)])}
        inputs = tuple(
            value if first[id(value)] == place else value.detach()
            for place, value in enumerate(inputs)
        )
        recorder = _Recorder(inputs)
        with torch.enable_grad(), recorder, _UndispatchedReads(recorder):
            values = function(*inputs)
        if recorder.found is not None:
            raise RuntimeError(recorder.found)
        recorder.graph.output([None if value is None else recorder.node(value) for value in values])
        tape = cls(recorder.graph, recorder.constants)
        return tape, [None if value is None else value.detach() for value in values]

    def __len__(self) -> int:
        """The number of operations."""
        return sum(node.op == "call_function" for node in self._graph.graph.nodes)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Sequence[Tensor | None]:
        """What the function gives, without a graph for gradients."""
        values: Sequence[Tensor | None] = self._run(self._graph, *inputs, *self._constants)
        return values


def _short(operation: Any) -> Any:
    """The function that Python code calls for an operation, where there is one.

    It does the same, but understands its arguments a microsecond or two faster.
    """
    if not isinstance(operation, torch._ops.OpOverload):
        return operation
    name = operation._schema.name.partition("::")[2]
    homes = (torch._C._VariableFunctions, torch._C._nn, torch._C._linalg)  # type: ignore[attr-defined]
    for home in (torch.Tensor,) if name.endswith("_") or name in ("expand", "view") else homes:
        if hasattr(home, name):
            return getattr(home, name)
    return operation


# -- when steps run from tapes ---------------------------------------------------------------------


class _Watched(NamedTuple):
    """A parameter or buffer, where it stands, and what tells whether it is still the same."""

    owner: dict[str, Any]
    name: str
    value: Tensor
    place: int
    version: int | None

    def same(self) -> bool:
        """No other tensor or memory; and the same numbers, of what no step writes to."""
        return (
            self.owner.get(self.name) is self.value
            and self.value.data_ptr() == self.place
            and (self.version is None or self.value._version == self.version)
        )


class Taped:
    """A function of tensors, from its tape as soon as there is one.

    Args:
        function: see :meth:`Tape.record`.
        module: has everything that the function reads and that lasts: its buffers may be written
            to in a call, its parameters not.
        after: calls with arguments of the same shapes before these are recorded, which costs as
            much as some hundred calls.

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
        self._watched: list[_Watched] = []
        self._written: set[int] = set()  # ids of buffers that recorded calls write to
        self.reason: str | None = None

    def doubt(self) -> None:
        """Compare again before the next run of a tape: something may have been changed."""
        for key in self._trusted & self._unused:
            # Doubted before it saved anything, as a batch that comes once an epoch: not worth it.
            del self._tapes[key]
            self._never.add(key)
        self._doubted |= self._trusted
        self._trusted.clear()
        if self._tapes and not all(one.same() for one in self._watched):
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
        if self._tapes and not all(one.same() for one in self._watched):
            self.doubt()
        tape = self._tapes.get(key)
        if tape is not None and key not in self._trusted:
            return self._compared(key, tape, inputs)
        if tape is not None:
            self._unused.discard(key)
            return tape(*inputs)
        self._calls[key] += 1
        if self._calls[key] <= self._after:
            return self._function(*inputs)
        return self._record(key, inputs)

    def _record(self, key: Any, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """One call that is written down; as if nothing had been where it cannot be."""
        tensors, python = list(self._tensors()), _Python(self._module)
        versions = [value._version for *_, value in tensors]
        # Of all buffers: which of them a call writes to is not known before it.
        state = self._state(value for *_, value in tensors if not isinstance(value, nn.Parameter))
        try:
            tape, values = Tape.record(self._function, *inputs)
            if python.changed():
                raise RuntimeError("Python changes an attribute or draws random numbers of its own")
            if [id(value) for *_, value in self._tensors()] != [id(value) for *_, value in tensors]:
                raise RuntimeError("a parameter or buffer is replaced instead of written into")
        except Exception as error:  # whatever a model's Python may do while it is recorded
            self._give_up(f"{type(error).__name__}: {error}")
            for owner, name, value in tensors:
                owner[name] = value
            self._restore(state)
            python.restore()
            return self._function(*inputs)
        self._tapes[key] = tape
        self._written |= {
            id(value)
            for (*_, value), version in zip(tensors, versions, strict=True)
            # Normalisations write past the counter of versions.
            if value._version != version
            or (value in state and not torch.equal(value, state[value]))
        }
        self._watched = [
            _Watched(owner, name, value, value.data_ptr(), self._version(value))
            for owner, name, value in tensors
        ]
        return values

    def _compared(self, key: Any, tape: Tape, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """One call by both ways, from the same state."""
        written = [one.value for one in self._watched if id(one.value) in self._written]
        before = self._state(written)
        try:
            # Not the numbers themselves, or two generations of gradients would lie there.
            own = _digests([*tape(*inputs), *self._state(written).values()])
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
            own = []
        self._restore(before)
        values = self._function(*inputs)
        if self.reason is None:
            if own == _digests([*values, *self._state(written).values()]):
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

    def _tensors(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Parameters and buffers with where they stand."""
        for module in self._module.modules():
            for owner in (module._parameters, module._buffers):
                for name, value in owner.items():
                    if value is not None:
                        yield owner, name, value

    def _version(self, value: Tensor) -> int | None:
        moves = isinstance(value, nn.Parameter) or id(value) in self._written
        return None if moves else value._version

    def _state(self, written: Iterable[Tensor]) -> dict[Tensor | None, Tensor]:
        """Copies of what a call changes: the random state, under None, and these tensors."""
        return {None: torch.get_rng_state(), **{value: value.clone() for value in written}}

    def _restore(self, state: dict[Tensor | None, Tensor]) -> None:
        for value, kept in state.items():
            if value is None:
                torch.set_rng_state(kept)
            elif not torch.equal(value, kept):  # to write is to change the version
                value.copy_(kept)


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
