"""How good every written file is on the same rows, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from scipy.special import ndtri
from torch import Tensor, nn

from pyro_sparse.inputs import Example, Inputs

from .check import Runner, called
from .program import Exported

__all__ = ["Labelled", "scored", "wilson"]

Labelled: TypeAlias = tuple[Example, Tensor]
"""Inputs, and a target for each: classes as whole numbers, or numbers."""

LEVEL = 0.95
BATCH = 256


def wilson(right: int, rows: int, level: float = LEVEL) -> tuple[float, float]:
    r"""Interval of a share of ``rows``, by Wilson's score.

    .. math::
        \frac{\hat p + z²/2n ± z \sqrt{\hat p (1 - \hat p)/n + z²/4n²}}{1 + z²/n}

    Source: Wilson, JASA 22 (1927).
    """
    share, z = right / rows, float(ndtri((1 + level) / 2))
    middle = share + z * z / (2 * rows)
    spread = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    # The share itself at both ends, which rounding would miss.
    return min(share, (middle - spread) / scale), max(share, (middle + spread) / scale)


def scored(
    net: nn.Module, runners: Mapping[str, Runner], test: Labelled, exported: Exported
) -> dict[str, Any]:
    """Scores of ``net`` in torch and of every file, on the same rows.

    Returns:
        ``rows``, and under ``scores``, by format (``torch``, ``pt2``, ``onnx``, ``int8``): for
        classes ``accuracy`` with the 95 % interval ``low`` to ``high`` and ``same``, the share of
        rows with torch's class; for numbers ``rmse``.

    Raises:
        ValueError: inputs and targets are not equally many, or too few for the only batch size.
    """
    rows, y = Inputs.of(net, test[0]).map(lambda value: value.detach().cpu()), test[1].cpu()
    if rows.batch != len(y) or not len(y):
        raise ValueError(
            f"expected as many targets as inputs in test=, got {len(y)} and {rows.batch}"
        )
    size = exported.inputs.batch if exported.fixed else BATCH
    starts = range(0, len(y) - (size - 1 if exported.fixed else 0), size)
    if not starts:
        raise ValueError(f"the network runs at a batch of {size} only, and test= has {len(y)} rows")
    parts = [rows.rows(slice(start, start + size)) for start in starts]
    y = y[: len(starts) * size]
    first = exported.outputs[0]
    every: dict[str, Runner] = {"torch": lambda inputs: called(net, inputs), **runners}
    draws = getattr(net, "draws", None) is not None
    outputs = {
        key: torch.cat([run(part)[first] for part in parts], 1 if draws else 0)
        for key, run in every.items()
    }
    if y.is_floating_point():
        values = {key: value.mean(0) if draws else value for key, value in outputs.items()}
        return {
            "rows": len(y),
            "scores": {
                key: {"rmse": float((value.reshape(y.shape) - y).square().mean().sqrt())}
                for key, value in values.items()
            },
        }
    classes = {
        key: (value.softmax(-1).mean(0) if draws else value).argmax(-1)
        for key, value in outputs.items()
    }
    if classes["torch"].shape != y.shape:
        raise ValueError(
            f"expected targets of shape {tuple(classes['torch'].shape)} for the classes that the "
            f"network's outputs {tuple(outputs['torch'].shape)} have last, got {tuple(y.shape)}"
        )
    scores = {}
    for key, chosen in classes.items():
        right = int((chosen == y).sum())
        low, high = wilson(right, y.numel())
        same = float((chosen == classes["torch"]).double().mean())
        scores[key] = {"accuracy": right / y.numel(), "low": low, "high": high, "same": same}
    return {"rows": len(y), "scores": scores}
