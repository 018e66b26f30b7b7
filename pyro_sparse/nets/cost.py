"""What a network costs."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_sparse.inputs import Example, Inputs

__all__ = ["count_macs", "count_parameters"]


def count_parameters(net: nn.Module) -> int:
    """Numbers among the parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in net.parameters())


@torch.no_grad()
def count_macs(net: nn.Module, example: Example | Inputs, rows: int = 1) -> int:
    """Multiplications and additions (MACs) for one input, in eval mode.

    Matrix products and convolutions, as ``torch.utils.flop_counter`` counts them: two floating
    point operations a MAC, biases and activations free.

    Args:
        example: inputs ``(batch, ...)``, of which the first is used.
        rows: use so many of them, of a network that takes no others, for the MACs of one.
    """
    # A copy, since eval mode and the counter's hooks must not show on the caller's network; the
    # hooks fail at views of what requires a gradient.
    net = copy.deepcopy(net).eval().requires_grad_(False)
    # Torch's fused attention is one operation, which the counter does not know.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            Inputs.of(net, example).rows(slice(0, rows)).call(net)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // (2 * rows)
