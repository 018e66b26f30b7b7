"""What a network is called with, and what comes back: one tensor, several, dictionaries of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Example", "Inputs", "named_tensors"]

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
    def of(cls, net: nn.Module, example: Example | Inputs) -> Inputs:
        """How ``net`` is called with an example.

        A dictionary is keyword arguments where forward has parameters of these names, and one
        argument otherwise. Whatever the example does not hold has forward's own default, but that
        no cache is asked for (``use_cache``): nothing here reads one.
        """
        if isinstance(example, Inputs):
            return example
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

    def call(self, net: Any) -> Any:
        return net(*self.args, **self.kwargs)

    def map(self, change: Any) -> Inputs:
        """With every tensor changed."""

        def one(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Inputs(tree_map(one, self.args), tree_map(one, self.kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        leaves = tree_leaves((self.args, self.kwargs))
        return [value for value in leaves if isinstance(value, Tensor)]

    @property
    def batch(self) -> int:
        """The number of examples: the first dimension of the first tensor that has one."""
        return next((len(value) for value in self.tensors if value.ndim), 1)

    def rows(self, index: Any) -> Inputs:
        """Some of the examples, of every tensor that has as many as there are."""
        batch = self.batch
        return self.map(lambda v: v[index] if v.ndim and len(v) == batch else v)

    @property
    def shapes(self) -> str:
        return ", ".join(str(tuple(value.shape)) for value in self.tensors)


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
