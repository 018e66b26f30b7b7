"""Reference architectures as plain ``nn.Module``, and what a network costs. No Pyro in here."""

from .build import build
from .cost import count_macs, count_parameters, macs_by_layer
from .lenet import lenet5_caffe
from .mlp import ACTIVATIONS, mlp

__all__ = [
    "ACTIVATIONS",
    "build",
    "count_macs",
    "count_parameters",
    "lenet5_caffe",
    "macs_by_layer",
    "mlp",
]
