"""Running statistics of batch normalisations, estimated anew.

In training a batch normalisation divides by the statistics of the batch, and its running averages
are those of the noisy weights of many steps. Another set of weights, such as the posterior's means
or one draw, has activations of another size: eval mode needs the statistics of just these weights
(as after weight averaging: Izmailov et al., UAI 2018, section 3.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_sparse.threads import ALONE

__all__ = ["estimate_statistics", "kept_statistics", "normalisations"]


def normalisations(net: nn.Module) -> list[_BatchNorm]:
    """The batch normalisations that keep running statistics."""
    return [
        module
        for module in net.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


@torch.no_grad()
def estimate_statistics(
    net: nn.Module, run: Callable[[Tensor], Any], batches: Iterable[Tensor]
) -> None:
    """Set the running statistics of ``net`` to their averages over ``batches``.

    Everything else in the network is in eval mode meanwhile. A network without batch
    normalisations is left alone.

    Args:
        net: its buffers are changed.
        run: passes a batch of inputs through ``net``, with whatever parameters.
        batches: of inputs, of one size: all count alike.
    """
    layers = normalisations(net)
    if not layers:
        return
    modes = [(module, module.training) for module in net.modules()]
    momenta = [layer.momentum for layer in layers]
    net.eval()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # of torch: the average of all batches
            layer.training = True
        for batch in batches:
            run(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def kept_statistics(net: nn.Module) -> Iterator[None]:
    """Whatever happens to the running statistics inside, they are afterwards what they were."""
    layers = normalisations(net)
    with ALONE:
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
