"""Mixed precision for the network only: priors, KL terms and likelihoods keep their precision.

Under ``torch.autocast`` the ELBO suspends it, and the model takes it up again for the network's own
forward pass, whose output is cast back. So a KL of thousands of nats is not summed in 8 bits.

What is asked of a network after training is asked in `full_precision`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

__all__ = ["autocast_enabled", "autocast_suspended", "full_precision", "network_autocast"]

_SUSPENDED: ContextVar[torch.dtype | None] = ContextVar("suspended autocast", default=None)


def autocast_enabled(device: torch.device) -> bool:
    """Whether operations on ``device`` choose their precision; not every device knows of that."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@contextlib.contextmanager
def autocast_suspended(device: torch.device) -> Iterator[None]:
    """Context without autocast on ``device``; `network_autocast` inside brings it back."""
    kind = device.type
    if not autocast_enabled(device):
        yield
        return
    token = _SUSPENDED.set(torch.get_autocast_dtype(kind))
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        _SUSPENDED.reset(token)


@contextlib.contextmanager
def network_autocast(device: torch.device) -> Iterator[None]:
    """Context with the autocast that was suspended around it, if any."""
    dtype = _SUSPENDED.get()
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype):
        yield


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Context in which float32 is float32 on CUDA, too.

    There, torch's convolutions round their factors to the 10 bits of TF32 unless told otherwise:
    far more than a compact network may differ from the masked one.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    # The names before torch 2.9, which refuses what mixes them with its own.
    exact: str | bool = False
    parts, name = (backends.cudnn, backends.cuda.matmul), "allow_tf32"
    if hasattr(backends.cudnn, "conv"):
        parts, name, exact = (backends.cudnn.conv, backends.cuda.matmul), "fp32_precision", "ieee"
    before = [getattr(part, name) for part in parts]
    try:
        for part in parts:
            setattr(part, name, exact)
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            setattr(part, name, value)
