"""What is left of each value when units are removed, and how operations must be told.

Most operations do on fewer units what they did on all of them. Some carry numbers of units in their
arguments: the sizes of a reshape, the bounds of a slice, the channels that a shortcut pads.
:class:`Removal` rewrites these, and runs every operation that moves entries on the *labels* of what
is left: it must give the labels that are expected, or the removal is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .rules import MOVEMENTS, SHAPES, SPLITS, Step, Walk, argument, pad_sizes, padding, rule_of
from .units import KEPT, Blocked, Value

__all__ = ["Call", "Removal"]


@dataclass(frozen=True)
class Call:
    """An operation as ``torch.fx`` writes it."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Removal:
    """The network of a walk without the units ``gone`` (labels of units, ``(n,)``)."""

    def __init__(self, walk: Walk, gone: Tensor) -> None:
        self.walk = walk
        units = torch.zeros(len(walk.atoms.parent), dtype=torch.bool)
        units[gone] = True
        self.gone = units

    def stays(self, labels: Tensor) -> Tensor:
        """Which labels' units are not gone."""
        roots = self.walk.atoms.find(labels)
        return ~(self.gone[roots.clamp(min=0)] & (roots >= 0))

    def cut(self, value: Value) -> tuple[int, Tensor] | None:
        """The dimension that has become shorter, and the entries left of it; None if none has.

        :raises ValueError: where units are gone from several dimensions, or all of them are.
        """
        stays = self.stays(value.labels)
        if stays.all():
            return None
        dims = [dim for dim in range(stays.ndim) if stays.shape[dim] > 1]
        if len(dims) > 1:
            # Labels may vary along several dimensions, but what is gone along one only.
            for dim in dims:
                first = stays.movedim(dim, 0).flatten(1)
                if bool((first == first[:, :1]).all()):
                    return dim, first[:, 0].nonzero().squeeze(1)
            raise ValueError("units are gone from several dimensions of one value")
        if not dims:
            raise ValueError("nothing is left of a value")
        return dims[0], stays.reshape(-1).nonzero().squeeze(1)

    def empty(self, value: Value) -> bool:
        """Whether nothing is left of a value."""
        return not bool(self.stays(value.labels).any())

    def left(self, value: Value) -> Tensor:
        """The labels that are left, in their true shape."""
        cut, labels = self.cut(value), value.full_labels()
        return labels if cut is None else labels.index_select(*cut)

    def left_shape(self, value: Value) -> torch.Size:
        """The shape of what is left of a value."""
        cut, shape = self.cut(value), list(value.shape)
        if cut is not None:
            shape[cut[0]] = len(cut[1])
        return torch.Size(shape)

    # -- arguments -------------------------------------------------------------------------------

    def rewritten(self, step: Step) -> Call | None:
        """The operation with the numbers of what is left; None where it can stay as it is.

        :raises ValueError: where it cannot be made to give what is left of its output.
        """
        node, walk = step.node, self.walk
        rule = rule_of(node, step.module)
        outputs = walk.values.get(node)
        if (
            rule not in MOVEMENTS
            or outputs is None
            or (isinstance(walk.values.get(node.all_input_nodes[0]), tuple))
        ):
            return None
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        if all(self.empty(value) for value in parts):
            return None
        if all(bool(self.stays(value.labels).all()) for value in (*step.inputs, *parts)):
            return None
        call = self._changed(step, parts)
        try:
            found = self._run(step, call)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{step} cannot be made to fit fewer units: {error}") from error
        found = found if isinstance(outputs, tuple) else (found,)
        for given, part in zip(found, parts, strict=True):
            if self.empty(part):
                fits = given.numel() == 0
            elif rule is padding:
                # New entries have labels of their own, which running it does not give.
                fits = given.shape == self.left(part).shape
            else:
                fits = torch.equal(given, self.left(part))
            if not fits:
                raise ValueError(f"{step} cannot be made to fit fewer units")
        return call

    def _run(self, step: Step, call: Call | None) -> Any:
        def value_of(node: fx.Node) -> Any:
            value = self.walk.values.get(node)
            if isinstance(value, Value):
                return self.left(value).contiguous()
            return self.walk.numbers.get(node)

        if call is None:
            call = Call(step.node.op, step.node.target, step.node.args, step.node.kwargs)
        args = fx.map_arg(call.args, value_of)
        kwargs = fx.map_arg(call.kwargs, value_of)
        if call.op == "call_module":
            assert step.module is not None
            return step.module(*args, **kwargs)
        if call.op == "call_method":
            return getattr(args[0], call.target)(*args[1:], **kwargs)
        return call.target(*args, **kwargs)

    def _changed(self, step: Step, parts: tuple[Value, ...]) -> Call | None:
        node = step.node
        target = node.target if step.module is None else type(step.module)
        if target in SHAPES:
            return self._reshaped(step, parts[0])
        if target in SPLITS:
            return self._split(step, parts)
        if target in (torch.cat, torch.concat):
            return self._joined(step)
        if rule_of(node, step.module) is padding:
            return self._padded(step, parts[0])
        if getattr(target, "__name__", "") == "getitem":
            return self._sliced(step)
        return None

    def _reshaped(self, step: Step, value: Value) -> Call | None:
        node, cut = step.node, self.cut(value)
        module = step.module
        first = 0
        if isinstance(module, nn.Unflatten):
            sizes: Any = list(module.unflattened_size)
            first = int(module.dim) % len(step.source.shape)
        elif "unflatten" in str(node.target):
            first = argument(step, "dim", 1, None) % len(step.source.shape)
            sizes = node.args[2] if len(node.args) > 2 else node.kwargs["sizes"]
        elif len(node.args) > 1 and not isinstance(node.args[1], tuple | list):
            sizes = node.args[1:]
        else:
            sizes = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()))
        sizes = list(sizes)
        lead = first or len(value.shape) - len(sizes)
        changed = list(sizes)
        for place, size in enumerate(sizes):
            dim = place + lead
            if size == -1:
                continue
            if cut is not None and dim == cut[0]:
                changed[place] = len(cut[1])
            elif isinstance(size, fx.Node) and size in self.walk.sizes:
                # It was computed from a size that has become another.
                changed[place] = value.shape[dim]
        if changed == sizes:
            return None
        if first or isinstance(module, nn.Unflatten):
            return Call("call_method", "unflatten", (node.args[0], first, changed), {})
        method = str(getattr(node.target, "__name__", node.target))
        return Call("call_method", method, (node.args[0], *changed), {})

    def _split(self, step: Step, parts: tuple[Value, ...]) -> Call | None:
        cut = self.cut(step.source)
        dim = argument(step, "dim", 2, 0) % len(step.source.shape)
        if cut is None or cut[0] != dim:
            return None
        sizes = [0 if self.empty(part) else self.left(part).shape[dim] for part in parts]
        return Call("call_function", torch.split, (step.node.args[0], sizes, dim), {})

    def _joined(self, step: Step) -> Call | None:
        nodes, *rest = step.node.args
        assert isinstance(nodes, list | tuple)
        left = [node for node in nodes if not self.empty(self.walk.values[node])]  # type: ignore[index]
        if len(left) == len(nodes):
            return None
        return Call("call_function", torch.cat, (left, *rest), dict(step.node.kwargs))

    def _padded(self, step: Step, value: Value) -> Call | None:
        cut, sizes = self.cut(value), pad_sizes(step)
        if cut is None:
            return None
        dim, entries = cut
        place = 2 * (len(value.shape) - 1 - dim)
        if place >= len(sizes) or not any(sizes[place : place + 2]):
            return None
        before, width = sizes[place], step.source.shape[dim]
        sizes[place] = int((entries < before).sum())
        sizes[place + 1] = int((entries >= before + width).sum())
        constant = getattr(step.module, "value", argument(step, "value", 3, 0.0))
        args = (step.node.args[0], sizes, "constant", constant or 0.0)
        return Call("call_function", F.pad, args, {})

    def _sliced(self, step: Step) -> Call | None:
        cut = self.cut(step.source)
        if cut is None:
            return None
        dim, entries = cut
        rank = len(step.source.shape)
        index = step.node.args[1]
        items = list(index) if isinstance(index, tuple) else [index]
        used = sum(1 for item in items if item is not None and item is not ...)
        place, changed = 0, list(items)
        for i, item in enumerate(items):
            if item is ...:
                place += rank - used
                continue
            if item is None:
                continue
            if place == dim and isinstance(item, slice) and item != slice(None):
                bounds = fx.map_arg(item, lambda node: self.walk.numbers[node])
                start, stop, stride = bounds.indices(step.source.shape[dim])
                if stride != 1:
                    return None
                low = int((entries < start).sum())
                changed[i] = slice(low, low + int(((entries >= start) & (entries < stop)).sum()))
            place += 1
        if changed == items:
            return None
        key = tuple(changed) if isinstance(index, tuple) else changed[0]
        return Call("call_function", step.node.target, (step.node.args[0], key), {})


def varying(walk: Walk, value: Value, blocked: Blocked | None = None) -> list[int]:
    """The dimensions along which the units of a value vary, the blocked ones all taken as one."""
    roots = walk.atoms.find(value.labels)
    if blocked is not None:
        roots = roots.masked_fill(blocked.among(roots), KEPT)
    return [
        dim
        for dim in range(roots.ndim)
        if roots.shape[dim] > 1 and not bool((roots == roots.narrow(dim, 0, 1)).all())
    ]
