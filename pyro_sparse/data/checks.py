"""Errors in our words before training starts, rather than NaN losses after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check(
    x: Tensor,
    y: Tensor,
    *,
    classes: int | None,
    features: int | Sequence[int] | None = None,
    integers: bool = False,
    one_target: bool = True,
    where: str = "data",
) -> None:
    """Raise unless ``x`` and ``y`` are data that a network can be trained on.

    Args:
        x: features, floating point, or whole numbers where ``integers`` says so.
            Shape: (N, features...).
        y: labels in 0..classes-1 (whole numbers, of any dtype), or real targets.
            Shape: (N,).
        classes: how many classes the network tells apart; None means regression.
        features: shape of one row of ``x`` that the network takes (an int for a plain vector);
            None accepts any.
        integers: whether the network takes whole numbers, such as tokens.
        one_target: whether a row has one number as its target; ``y`` is (N, ...) otherwise.
        where: named at the start of every message, such as ``"training set"`` or a file.

    Raises:
        TypeError: ``x`` or ``y`` is no tensor.
        ValueError: no rows, x and y of different lengths, another shape or dtype than expected,
            NaN or infinite values, labels that are no whole numbers or lie outside the classes.
            The message has what was expected, what came, and what to do.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{where}: expected {name} as a torch.Tensor, got {type(value).__name__}; "
                f"convert it with torch.as_tensor({name})."
            )
    shapes = f"x has shape {tuple(x.shape)}, y has shape {tuple(y.shape)}"
    if x.dim() < 2 and features != ():
        raise ValueError(
            f"{where}: expected x of shape (N, features...), but {shapes}; "
            "a single feature is x.unsqueeze(-1), a single row x.unsqueeze(0)."
        )
    if y.dim() != 1 and (one_target or not y.dim()):
        raise ValueError(
            f"{where}: expected y of shape (N,), one label or target a row, but {shapes}; "
            "use y.squeeze(-1) for a column, y.argmax(-1) for one-hot labels."
        )
    if len(x) != len(y):
        raise ValueError(
            f"{where}: expected as many rows in x as in y, but {shapes}; "
            "check that both come from the same rows of the same file."
        )
    if x.numel() == 0:
        raise ValueError(
            f"{where}: empty ({shapes}); expected at least one row and one feature. "
            "Check the file, the filter or the split that they come from."
        )
    if features is not None:
        expected = (features,) if isinstance(features, int) else tuple(features)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{where}: expected rows of shape {expected}, as the network takes them, but "
                f"{shapes}, so rows of {tuple(x.shape[1:])}; choose other columns or reshape x, "
                "or build the network for these."
            )
    if integers and (x.is_floating_point() or x.is_complex()):
        raise ValueError(
            f"{where}: expected x of whole numbers, as in the model's example, got {x.dtype} "
            f"({shapes}); convert it with x.long()."
        )
    if not integers and not x.is_floating_point():
        raise ValueError(
            f"{where}: expected floating-point x, got {x.dtype} ({shapes}); "
            "convert it with x.float() and scale it to about unit variance."
        )
    _check_finite(x, "x", where, "Drop or impute these rows.")
    _check_finite(y, "y", where, "Drop these rows.")
    if classes is not None:
        _check_labels(y, classes, where)


def _check_finite(value: Tensor, name: str, where: str, advice: str) -> None:
    finite = torch.isfinite(value)
    if finite.all():
        return
    index = (~finite).nonzero()[0].tolist()
    first = value[tuple(index)].item()
    row, *column = index
    place = f"row {row}" + (f", column {', '.join(map(str, column))}" if column else "")
    raise ValueError(
        f"{where}: {int((~finite).sum())} of {value.numel()} values of {name} (shape "
        f"{tuple(value.shape)}) are NaN or infinite, the first ({first}) in {place}; "
        f"expected finite numbers only. {advice}"
    )


def _check_labels(y: Tensor, classes: int, where: str) -> None:
    problems = [
        (
            (y < 0) | (y >= classes),
            f"lie outside the {classes} classes",
            "Renumber the labels from 0, or give the network as many outputs as there are classes.",
        )
    ]
    if y.is_floating_point():
        problems.insert(0, (y != y.round(), "are no whole numbers", "Is this a regression task?"))
    for bad, problem, advice in problems:
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{where}: {int(bad.sum())} of {len(y)} labels {problem}, the first "
                f"({y[row].item()}) in row {row}; expected whole numbers 0..{classes - 1}. {advice}"
            )
