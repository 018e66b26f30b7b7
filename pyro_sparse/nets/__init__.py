"""Reference architectures as plain ``nn.Module``, and what a network costs. No Pyro in here."""

from .attention import Attention
from .build import build
from .cost import count_macs, count_parameters
from .lenet import lenet5_caffe
from .mlp import ACTIVATIONS, mlp
from .resnet import resnet
from .statistics import estimate_statistics, kept_statistics, normalisations
from .vgg import vgg
from .vit import vit

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
