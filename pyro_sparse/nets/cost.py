"""What a network costs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_parameters"]


def count_parameters(net: nn.Module) -> int:
    """Numbers among the parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in net.parameters())


@torch.no_grad()
def count_macs(net: nn.Module, example: Any) -> int:
    """Multiplications and additions (MACs) for one input, in eval mode.

    Matrix products and convolutions, as ``torch.utils.flop_counter`` counts them: two floating
    point operations a MAC, biases and activations free.

    :param example: an input ``(batch, ...)``, of which the first is used, or the arguments of a
        call (:class:`pyro_sparse.graph.Inputs`).
    """
    # A copy, since eval mode and the counter's hooks must not show on the caller's network; the
    # hooks fail at views of what requires a gradient.
    net = copy.deepcopy(net).eval().requires_grad_(False)
    # Torch's fused attention is one operation, which the counter does not know.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            net(example[:1]) if isinstance(example, Tensor) else example.rows([0]).call(net)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2
