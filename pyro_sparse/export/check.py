"""Whether an exported file computes what the torch network computes, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.graph import evaluating

__all__ = ["BATCHES", "example_inputs", "input_of", "largest_difference"]

BATCHES = (1, 3, 64)
"""Batch sizes at which exported files are compared. 1 is the one that exporters like to fix."""


def input_of(net: nn.Module, example: Tensor | None) -> Tensor | None:
    """An input ``(batch, ...)`` of ``net``; None where nobody said what it takes.

    :param example: as given by the user; otherwise what ``net.input_shape`` says, which
        :func:`~pyro_sparse.export.compact` sets.
    :raises ValueError: for an example that is no batch.
    """
    if example is not None:
        if not isinstance(example, Tensor) or example.dim() < 1 or not len(example):
            raise ValueError(
                "expected example to be a tensor (batch, ...) with at least one input, got "
                f"{tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__}"
            )
        return example.detach().cpu()
    shape = getattr(net, "input_shape", None)
    if shape is None:
        return None
    floating = [value.dtype for value in net.parameters() if value.is_floating_point()]
    return torch.zeros(1, *shape, dtype=floating[0] if floating else None)


def example_inputs(example: Tensor, batch: int) -> Tensor:
    """``batch`` inputs: drawn from ``example`` where it holds several, standard normal otherwise.

    Integers are always its own: any other might be out of an embedding's range.

    :param example: inputs ``(any batch, ...)``.
    :returns: ``(batch, ...)``, the same for the same arguments.
    """
    generator = torch.Generator().manual_seed(batch)
    alike = len(example) == 1 or bool((example == example[:1]).all())
    if alike and example.is_floating_point():
        values = torch.randn((batch, *example.shape[1:]), generator=generator)
        return values.to(example.dtype)
    return example[torch.randint(len(example), (batch,), generator=generator)]


@torch.no_grad()
def largest_difference(
    net: nn.Module,
    other: Callable[[Tensor], Tensor],
    example: Tensor,
    name: str,
    batches: Sequence[int] = BATCHES,
) -> dict[str, float]:
    """How far the outputs of ``net`` and ``other`` are apart, over the batch sizes.

    :param net: the torch network.
    :param other: the same network, elsewhere; it takes and gives tensors on the CPU.
    :param name: what ``other`` is, for the error.
    :returns: ``max_abs_diff``, and ``max_abs_output`` beside it.
    :raises ValueError: where they differ by more than 1e-5 (of the output's size, where that is
        larger than 1; sums are rounded in another order), or where ``other`` does not accept a
        batch size.
    """
    largest, scale = 0.0, 0.0
    device = next((value.device for value in net.parameters()), torch.device("cpu"))
    for batch in batches:
        inputs = example_inputs(example, batch)
        try:
            with evaluating(net):
                expected = net(inputs.to(device)).cpu()
        except Exception as error:  # whatever the network raises
            raise ValueError(
                f"{type(net).__name__} does not run on inputs of shape {tuple(inputs.shape)}, and "
                f"batches of any size are expected: {error}"
            ) from error
        try:
            got = other(inputs)
        except Exception as error:  # whatever the other runtime raises
            raise ValueError(
                f"{name} does not run on a batch of {batch}, which torch does: {error}"
            ) from error
        if got.shape != expected.shape:
            raise ValueError(
                f"{name} returns shape {tuple(got.shape)} for a batch of {batch}, torch "
                f"{tuple(expected.shape)}: the network computes with a fixed batch size"
            )
        difference = float((got - expected).abs().max())
        size = float(expected.abs().max())
        eps = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
        if not difference <= max(1e-5, 10 * eps) * max(1.0, size):
            raise ValueError(
                f"{name} differs from torch by {difference:.2g} on outputs of size {size:.2g} at "
                f"batch {batch}"
            )
        largest, scale = max(largest, difference), max(scale, size)
    return {"max_abs_diff": largest, "max_abs_output": scale}


def described(example: Tensor) -> Mapping[str, Any]:
    """Shape of one input and its type, for config.json."""
    return {"shape": list(example.shape[1:]), "dtype": str(example.dtype).removeprefix("torch.")}
