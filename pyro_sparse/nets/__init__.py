"""Reference architectures as plain ``nn.Module``, and what a network costs. No Pyro in here."""

from ._build import build
from ._mlp import ACTIVATIONS, mlp
from ._resnet import resnet
from ._vgg import vgg
from ._vit import vit
from .attention import Attention
from .cost import count_macs, count_parameters
from .lenet import lenet5_caffe
from .statistics import estimate_statistics, kept_statistics, normalisations

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "build",
    "count_macs",
    "count_parameters",
    "estimate_statistics",
    "kept_statistics",
    "lenet5_caffe",
    "mlp",
    "normalisations",
    "resnet",
    "vgg",
    "vit",
]
