"""From a fitted posterior to the network that is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.inputs import Example
from pyro_sparse.models import SparseModel
from pyro_sparse.posterior import FittedNetwork, Posterior, SelectionRule
from pyro_sparse.precision import full_precision
from pyro_sparse.ranges import whole

from ._compact import compact_network, equivalence, tensors_of

__all__ = ["compact"]


def compact(
    posterior: Posterior,
    keep: Mapping[str, Tensor] | None = None,
    *,
    rule: SelectionRule | None = None,
    align: int | None = None,
    scores: Mapping[str, Tensor] | None = None,
    fold: bool = False,
    check: bool = True,
    inputs: Example | None = None,
) -> nn.Module:
    """The plain, physically smaller network that a posterior leaves.

    Posterior-mean weights of the units that are kept; on the CPU, in eval mode, without Pyro. It is
    run beside the masked full-size network before it is returned.

    Args:
        posterior: model with fitted guide.
        keep: masks ``(units,)`` by group; by ``rule`` when absent.
        rule: a selection rule; the model's default when absent.
        align: readmit the next most probable units until each layer's width is a multiple of this:
            runtimes are fast at multiples of 4, 8 or 16, and can be slower at a smaller width.
        scores: what ranks the units that are readmitted, ``(units,)`` by group; inclusion
            probabilities when absent.
        fold: let batch normalisations go into the layers before them.
        check: compare its output with the masked network's; without, only its size is sure.
        inputs: what it is run on, ``(batch, ...)`` or several; the model's example when absent.

    Returns:
        A module that takes the same inputs as the network: of the network's own class where its
        code allows that (``compaction["form"]``). Its attribute ``compaction`` says what
        went, see :func:`~pyro_sparse.export.compact_network`; with ``align``, which units came
        back. ``input_shape`` is the shape of one input.

    Raises:
        ValueError: nothing would be left but a constant, or a mask does not fit its group.
        RuntimeError: the compact network does not compute what the masked one does.
    """
    if not isinstance(posterior, FittedNetwork):
        raise ValueError(f"expected a Posterior, got {type(posterior).__name__}")
    if keep is not None and rule is not None:
        raise ValueError("expected masks (keep) or a rule that makes them, got both")
    if align is not None:
        whole(align=align)
    keep = posterior.keep(rule) if keep is None else keep
    model = posterior.model
    parameters = posterior.mean_parameters()
    small = compact_network(
        model.net,
        model.graph,
        parameters,
        keep,
        align=align,
        scores=posterior.inclusion() if scores is None else scores,
        fold=fold,
        output=model.output,
        inputs=None if inputs is None else model.inputs(inputs),
    )
    if check:
        check_compact(model, parameters, keep, small)
    if model.example_shape:
        small.input_shape = tuple(model.example_shape[1:])  # type: ignore[assignment]
    return small


def check_compact(
    model: SparseModel,
    parameters: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    small: nn.Module,
) -> None:
    """Raise ``RuntimeError`` where ``small`` does not compute what the masked network does."""
    example = next(iter(parameters.values()))
    inputs: Any = small.example
    on_device = inputs.map(lambda value: value.to(example.device))
    with torch.no_grad(), full_precision(example.device):
        difference = equivalence(
            model.net, model.graph, parameters, keep, small, on_device, model.output
        )
        # As a graph, it returns the output that is read, and nothing else.
        outputs = tensors_of(inputs.call(small), model.output)
        size = max(1.0, *(float(value.abs().max()) for value in outputs if value.numel()))
    # Sums over fewer terms round differently: about 1e-6 of the output in single precision.
    if not difference <= 100 * torch.finfo(example.dtype).eps * size:
        raise RuntimeError(
            f"the compact network differs from the masked one by {difference:.2g} on outputs of "
            f"size {size:.2g}; this is a bug in pyro-sparse, please report the network"
        )
