"""Whether an exported file computes what the torch network computes, on the user's own rows."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pyro_sparse.graph import evaluating
from pyro_sparse.inputs import Example, Inputs, named_tensors

__all__ = [
    "BATCHES",
    "Runner",
    "called",
    "described",
    "device_of",
    "example_rows",
    "input_of",
    "largest_difference",
    "outputs_of",
    "tensors_only",
]

BATCHES = (1, 3, 64)
"""Batch sizes at which exported files are compared. 1 is the one that exporters like to fix."""

Runner: TypeAlias = Callable[[Inputs], dict[str, Tensor]]
"""Runs a network somewhere, on inputs that lie on the CPU; its outputs by name."""

SINGLE = 1e-5  # of the outputs' size: sums are rounded in another order


def input_of(net: nn.Module, example: Example | Inputs | None) -> Inputs:
    """Example rows of ``net``, on the CPU.

    Args:
        example: as given by the user; otherwise what ``net.example`` or ``net.input_shape`` says,
            which :func:`~pyro_sparse.export.compact` sets. The latter are zeros: a shape.

    Raises:
        ValueError: for an example that is no batch, and where nobody said what ``net`` takes.
    """
    if example is None:
        example = getattr(net, "example", None)
    shape: Any = getattr(net, "input_shape", None)
    if example is None and shape is not None:
        floating = [value.dtype for value in net.parameters() if value.is_floating_point()]
        example = torch.zeros([2, *shape], dtype=floating[0] if floating else None)
    if example is None:
        raise ValueError(
            "a file needs an example input: pass example=, a tensor (batch, ...), a tuple of them "
            "or a dictionary of keyword inputs"
        )
    inputs = Inputs.of(net, example).map(lambda value: value.detach().cpu())
    if not any(value.ndim and len(value) for value in inputs.tensors):
        raise ValueError(
            "expected example to be a tensor (batch, ...) with at least one input, got "
            f"{inputs.described or type(example).__name__}"
        )
    return inputs


def example_rows(example: Inputs, batch: int | None) -> Inputs:
    """``batch`` inputs, drawn from the rows of ``example``, or all of these in their order.

    Floating-point inputs that are all 0 say a shape and nothing else: they are standard normal.
    """
    generator = torch.Generator().manual_seed(batch or 0)
    if batch is not None:
        example = example.rows(torch.randint(example.batch, (batch,), generator=generator))

    def known(value: Tensor) -> Tensor:
        if not value.is_floating_point() or not value.ndim or bool(value.any()):
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    return example.map(known)


def device_of(net: nn.Module) -> torch.device:
    """Where a network lies; the CPU where it has no tensors."""
    return next(
        (value.device for value in (*net.parameters(), *net.buffers())), torch.device("cpu")
    )


def called(net: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """What ``net`` returns in eval mode, by name, on the CPU; caches and the like are left out."""
    device = device_of(net)
    with evaluating(net):
        outputs = inputs.map(lambda value: value.to(device)).call(net)
    return {name: value.detach().cpu() for name, value in outputs_of(outputs).items()}


def outputs_of(value: Any) -> dict[str, Tensor]:
    """The tensors among a network's outputs by names that are identifiers: ``output`` for one."""

    def named(name: str) -> str:
        name = name.replace(".", "_")
        return f"output_{name}" if name[:1].isdigit() else name or "output"

    return {named(name): tensor for name, tensor in named_tensors(value).items()}


def tensors_only(inputs: Inputs) -> Inputs:
    """Without keyword inputs that are no tensors: those are part of an exported network."""
    kwargs = {name: value for name, value in inputs.kwargs.items() if Inputs((value,)).tensors}
    return Inputs(inputs.args, kwargs)


@torch.no_grad()
def largest_difference(
    net: nn.Module,
    other: Runner,
    example: Inputs,
    name: str,
    batches: Sequence[int] | None = BATCHES,
    *,
    rounded: bool = False,
) -> dict[str, float]:
    """How far the outputs of ``net`` and ``other`` are apart, over the batch sizes.

    Args:
        net: the torch network.
        other: the same network, elsewhere.
        example: rows that are drawn from.
        name: what ``other`` is, for the error.
        batches: None for the example as it is, of a network for one batch size only.
        rounded: ``other`` computes with numbers of lower precision: any difference is returned that
            is finite.

    Returns:
        ``max_abs_diff``, beside it ``max_abs_output``, and ``rounding``, the largest difference of
        the network from itself in double precision.

    Raises:
        ValueError: where they differ by more than 1e-5 of the outputs' size (that of 1 at least)
            and ten times the network's own rounding, or where ``other`` does not accept a batch
            size.
    """
    found = {"max_abs_diff": 0.0, "max_abs_output": 0.0, "rounding": 0.0}
    for inputs in [example] if batches is None else [example_rows(example, n) for n in batches]:
        try:
            expected = called(net, inputs)
        except Exception as error:  # whatever the network raises
            raise ValueError(
                f"{type(net).__name__} does not run on inputs of shape {inputs.described}, and "
                f"batches of any size are expected: {error}"
            ) from error
        try:
            got = other(inputs)
        except Exception as error:  # whatever the other runtime raises
            raise ValueError(
                f"{name} does not run on a batch of {inputs.batch}, which torch does: {error}"
            ) from error
        exact = _in_double(net, inputs)
        if got.keys() != expected.keys():
            raise ValueError(f"{name} returns {list(got)}, torch {list(expected)}")
        for key, value in expected.items():
            if got[key].shape != value.shape:
                raise ValueError(
                    f"{name} returns shape {tuple(got[key].shape)} for a batch of {inputs.batch}, "
                    f"torch {tuple(value.shape)}: the network computes with a fixed batch size"
                )
            difference, size = _apart(value, got[key]), _size(value)
            rounding = _apart(value, exact[key]) if key in exact else 0.0
            eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
            most = max(SINGLE, 10 * eps) * max(1.0, size) + 10 * rounding
            if not difference <= (sys.float_info.max if rounded else most):
                raise ValueError(
                    f"{name} differs from torch by {difference:.2g} on outputs of size {size:.2g} "
                    f"at batch {inputs.batch}"
                )
            for what, number in zip(found, (difference, size, rounding), strict=True):
                found[what] = max(found[what], number)
    return found


def _in_double(net: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs in double precision; none where the network's code does not allow that."""
    try:
        exact = copy.deepcopy(net).cpu().double()
        return called(exact, inputs.map(lambda v: v.double() if v.is_floating_point() else v))
    except Exception:  # whatever the network's own code makes of another type
        return {}


def _apart(first: Tensor, second: Tensor) -> float:
    """Largest difference; infinities and NaN must stand at the same places."""
    first, second = first.double(), second.double()
    same = (first == second) | (first.isnan() & second.isnan())
    difference = (first - second).abs().masked_fill(same, 0.0)
    return float(difference.nan_to_num(float("inf")).max()) if difference.numel() else 0.0


def _size(value: Tensor) -> float:
    finite = value[value.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def described(example: Inputs, names: Sequence[str]) -> list[dict[str, Any]]:
    """Shape of one input and its type, by name, for config.json; ``shared`` without a batch."""
    return [
        {
            "name": name,
            "shape": list(
                value.shape[1:] if value.ndim and len(value) == example.batch else value.shape
            ),
            "dtype": str(value.dtype).removeprefix("torch."),
            "batch": bool(value.ndim and len(value) == example.batch),
        }
        for name, value in zip(names, example.tensors, strict=True)
    ]
