"""What a run is a run of: kept with its checkpoints, and compared before it goes on.

A checkpoint fits any model of the same shapes. What shapes do not show (other data, another
activation, another prior, other rates) would be trained on without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.models import SparseModel

__all__ = ["differences", "digest", "identity"]

DIGEST = 16  # bytes
SHOWN = 4
"""Tensors of so many numbers are kept as they are, larger ones by their digest."""


def digest(*tensors: Tensor) -> str:
    """A short hexadecimal digest of types, shapes and numbers."""
    made = hashlib.blake2b(digest_size=DIGEST)
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        made.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        made.update(value.flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()


def identity(
    model: SparseModel, guide: nn.Module, loader: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides a training run, in words, numbers and digests that JSON can hold.

    Args:
        model: as it is when training starts.
        guide: by its class and the names and shapes of its parameters.
        loader: by its data, where it holds them, and the size of its batches; of other loaders
            only the number of examples is known.
        options: of `fit`, as JSON can hold them.
    """
    constants = {
        name: _short(value)
        for part in (model, model.likelihood)
        for name, value in part.named_buffers(recurse=False)
    }
    parameters = [f"{name} {tuple(value.shape)}" for name, value in guide.named_parameters()]
    found: dict[str, Any] = {
        "network": hashlib.blake2b(
            f"{model.net!r}\n{model.graph.explain()}".encode(), digest_size=DIGEST
        ).hexdigest(),
        "likelihood": type(model.likelihood).__name__,
        "num_data": model.num_data,
        "guide": hashlib.blake2b("\n".join(parameters).encode(), digest_size=DIGEST).hexdigest(),
        **{f"constant {name}": value for name, value in constants.items()},
        **{f"option {name}": value for name, value in options.items()},
    }
    data = _tensors(loader)
    if data:
        found["data"] = digest(*data)
        found["examples"] = len(data[0])
    for name in ("batch_size", "drop_last", "shuffle"):
        value = getattr(loader, name, None)
        if isinstance(value, bool | int):
            found[f"loader {name}"] = value
    return found


def _tensors(loader: Any) -> Sequence[Tensor]:
    """The tensors that a loader serves, where it holds them."""
    found: Any = (getattr(loader, "x", None), getattr(loader, "y", None))
    if found == (None, None):
        found = getattr(getattr(loader, "dataset", None), "tensors", ())
    return found if all(isinstance(one, Tensor) for one in found) else ()


def _short(value: Tensor) -> Any:
    return value.tolist() if value.numel() <= SHOWN else digest(value)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs of all that both identities know, a phrase each."""
    found = []
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if old != new:
            hidden = isinstance(old, str) and len(old) == 2 * DIGEST
            found.append(f"another {name}" if hidden else f"{name} was {old!r}, is {new!r}")
    return sorted(found)
