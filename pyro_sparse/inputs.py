"""What a network is called with, and what comes back: one tensor, several, dictionaries of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

__all__ = [
    "Example",
    "Inputs",
    "Several",
    "as_rows",
    "has_rows",
    "joined",
    "named_tensors",
    "tensors_of",
]

Example: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a network is called with: one tensor, several by position, or several by name."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a network.

    args: by position.
    kwargs: by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, net: nn.Module, example: Example | Inputs | Several) -> Inputs:
        """How ``net`` is called with an example.

        A dictionary is keyword arguments where forward has parameters of these names, and one
        argument otherwise. Whatever the example does not hold has forward's own default, but that
        no cache is asked for (``use_cache``): nothing here reads one.
        """
        if isinstance(example, Inputs):
            return example
        if isinstance(example, Several):
            example = example.value
        parameters = inspect.signature(net.forward).parameters
        kwargs: dict[str, Any] = {}
        if isinstance(example, Tensor):
            args: tuple[Any, ...] = (example,)
        elif isinstance(example, Mapping):
            free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            named = all(name in parameters or free for name in example)
            args, kwargs = ((), dict(example)) if named and example else ((dict(example),), {})
        elif isinstance(example, tuple | list):
            args = tuple(example)
        else:
            raise ValueError(
                "expected an example input: a tensor (batch, ...), a tuple of them, or a "
                f"dictionary of keyword inputs, got {type(example).__name__}"
            )
        if "use_cache" in parameters and "use_cache" not in kwargs and len(args) < 2:
            kwargs["use_cache"] = False
        return cls(args, kwargs)

    def like(self, net: nn.Module, x: Several) -> bool:
        """Whether ``net`` is called with ``x`` in the way that these are: places and names."""
        given = Inputs.of(net, x)
        return tree_structure((given.args, given.kwargs)) == tree_structure(
            (self.args, self.kwargs)
        )

    def call(self, net: Any) -> Any:
        return net(*self.args, **self.kwargs)

    def map(self, change: Any) -> Inputs:
        """With every tensor changed."""

        return Inputs(*_mapped(change, (self.args, self.kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def batch(self) -> int:
        """The number of examples: the first dimension of the first tensor that has one."""
        return next((len(value) for value in self.tensors if value.ndim), 1)

    def rows(self, index: Any) -> Inputs:
        """Some of the examples, of every tensor that has as many as there are."""
        batch = self.batch
        return self.map(lambda value: value[index] if has_rows(value, batch) else value)

    @property
    def described(self) -> str:
        """Names or places of the tensors with their shapes, for messages."""
        parts = [str(tuple(value.shape)) for value in _tensors(self.args)]
        for name, given in self.kwargs.items():
            parts += [f"{name} {tuple(value.shape)}" for value in _tensors(given)]
        return ", ".join(parts)


def has_rows(value: Tensor, count: int) -> bool:
    """Whether a tensor has a row for each of so many examples, and is not one for all of them."""
    return value.ndim > 0 and len(value) == count


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same with every tensor changed."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, tree)


class Several:
    """Inputs of more than one tensor that are indexed, moved and split as one tensor would be.

    Args:
        value: a tuple or dictionary of tensors. Those with as many rows as the first one that has
            any are rows, the others belong to all of them.
    """

    def __init__(self, value: Sequence[Any] | Mapping[str, Any]) -> None:
        self.value: Any = dict(value) if isinstance(value, Mapping) else tuple(value)
        self.tensors = _tensors(self.value)
        if not any(tensor.ndim for tensor in self.tensors):
            raise ValueError(
                "expected inputs with at least one tensor (batch, ...), got "
                + (", ".join(type(leaf).__name__ for leaf in tree_leaves(self.value)) or "none")
            )

    def map(self, change: Callable[[Tensor], Tensor]) -> Several:
        """With every tensor changed."""
        return Several(_mapped(change, self.value))

    def replaced(self, tensors: Iterable[Tensor]) -> Several:
        """With these tensors in the places of its own."""
        there = iter(tensors)
        return self.map(lambda _: next(there))

    def _rows(self, change: Callable[[Tensor], Tensor]) -> Several:
        count = len(self)
        return self.map(lambda value: change(value) if has_rows(value, count) else value)

    def __len__(self) -> int:
        return next(len(tensor) for tensor in self.tensors if tensor.ndim)

    def __getitem__(self, index: Any) -> Several:
        return self._rows(lambda tensor: tensor[index])

    def index_select(self, dim: int, index: Tensor) -> Several:
        """Rows, by number; ``dim`` is 0."""
        return self._rows(lambda tensor: tensor.index_select(dim, index))

    def split(self, size: int) -> list[Several]:
        """In parts of so many rows."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Several:
        """On a device."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of all tensors, for messages."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)


def as_rows(x: Any) -> Any:
    """A tensor as it is; a tuple, list or dictionary of several as one thing of rows."""
    return Several(x) if isinstance(x, tuple | list | Mapping) else x


def tensors_of(x: Tensor | Several) -> list[Tensor]:
    """The one tensor, or all of them."""
    return x.tensors if isinstance(x, Several) else [x]


def joined(parts: Sequence[Any]) -> Any:
    """The rows of several batches, tensors or `Several`, as one batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    columns = zip(*(part.tensors for part in parts), strict=True)
    return first.replaced(
        torch.cat(column) if has_rows(column[0], len(first)) else column[0] for column in columns
    )


def named_tensors(outputs: Any) -> dict[str, Tensor]:
    """The tensors among a network's outputs, by name or place; caches and the like are none."""
    if isinstance(outputs, Tensor):
        return {"": outputs}
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, Mapping):
        items: Any = [(f.name, getattr(outputs, f.name)) for f in dataclasses.fields(outputs)]
    elif isinstance(outputs, Mapping):
        items = list(outputs.items())
    elif isinstance(outputs, tuple | list):
        names = getattr(outputs, "_fields", range(len(outputs)))
        items = list(zip(names, outputs, strict=True))
    else:
        return {}
    found = {}
    for name, value in items:
        for rest, tensor in named_tensors(value).items():
            found[f"{name}.{rest}" if rest else str(name)] = tensor
    return found
