"""What is left of each value when units are removed, and how operations must be told.

Most operations do on fewer units what they did on all of them. Some carry numbers of units in their
arguments (:meth:`.operations.Operation.shrunk`). Every operation that moves entries is run on the
*labels* of what is left: it must give the labels that are expected, or the removal is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .units import Value
from .walk import Step, Walk, parts

__all__ = ["Removal"]


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
        if not len(self.gone):
            return torch.ones(roots.shape, dtype=torch.bool)
        return ~(self.gone[roots.clamp(min=0)] & (roots >= 0))

    def cut(self, value: Value) -> tuple[int, Tensor] | None:
        """The dimension that has become shorter, and the entries left of it; None if none has.

        Raises:
            ValueError: where units are gone from several dimensions, or all of them are.
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

    def rewritten(
        self, step: Step, operation: Any
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
        """Target and arguments for what is left; None where the operation can stay as it is.

        Args:
            operation: what is known of the step's operation, None for nothing.

        Raises:
            ValueError: where it cannot be made to give what is left of its output.
        """
        outputs = list(parts(self.walk.values.get(step.node)))
        if operation is None or not outputs or all(self.empty(value) for value in outputs):
            return None
        values = [*step.followed, *outputs]
        if all(bool(self.stays(value.labels).all()) for value in values):
            return None
        changed = operation.shrunk(step, self)
        call: tuple[Any, Any, Any] | None = None
        if changed and "target" in changed:
            call = changed["target"], changed["args"], {}
        elif changed:
            call = step.node.target, *step.arguments(**changed)
        if operation.moves:
            self._check(step, operation, call, outputs)
        return call

    def _check(self, step: Step, operation: Any, call: Any, outputs: list[Value]) -> None:
        try:
            found = operation.moved(step, self.left, call)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{step} cannot be made to fit fewer units") from error
        if found is None:
            return
        found = found if isinstance(found, tuple | list) else [found]
        if len(found) != len(outputs):
            raise ValueError(f"{step} cannot be made to fit fewer units")
        for given, part in zip(found, outputs, strict=True):
            fits = given.numel() == 0 if self.empty(part) else torch.equal(given, self.left(part))
            if not fits:
                raise ValueError(f"{step} cannot be made to fit fewer units")
