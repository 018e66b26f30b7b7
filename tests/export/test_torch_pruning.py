"""Agreement with Torch-Pruning, the usual tool, where it is right.

It removes channels without regard to what they emit, so it is right where an excluded unit emits
zeros, as all of these do, and where no shortcut pads and no feature behind a flatten goes alone.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_sparse.export import compact_network
from pyro_sparse.graph import groups
from pyro_sparse.nets import count_macs, count_parameters, lenet5_caffe, mlp, resnet, vgg

tp = pytest.importorskip("torch_pruning")


class Joined(nn.Module):
    """Two branches, concatenated."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 5, 3)
        self.norm, self.c = nn.BatchNorm2d(5), nn.Conv2d(11, 4, 3)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([F.relu(self.a(x)), F.relu(self.norm(self.b(x)))], 1)
        return self.out(F.relu(self.c(x)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: mlp([12, 9, 8, 3], "relu"), (12,)),
        (lambda: lenet5_caffe(widths=(6, 7, 20)), (1, 28, 28)),
        (lambda: vgg(layers=(8, "M", 10, 12), hidden=16), (3, 8, 8)),
        (lambda: resnet(14, option="B", widths=(6, 8, 10)), (3, 8, 8)),
        (Joined, (3, 8, 8)),
    ],
)
def test_same_networks(make, shape):
    net, x = make().eval(), torch.randn(3, *shape)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.uniform_(0.5, 2)
    graph = groups(net, x)
    own = dict(net.named_parameters())
    keep = {
        group.name: torch.arange(group.size) % 3 != 1
        for group in graph
        if group.prunable and group.writers
    }
    ours = compact_network(net, graph, own, keep)
    # Theirs starts at the masked network, whose excluded channels are all zero.
    theirs = copy.deepcopy(net)
    for name, value in graph.masked_parameters(own, keep).items():
        theirs.get_parameter(name).data = value.detach().clone()
    for group in graph:
        if group.name not in keep:
            continue
        found = tp.DependencyGraph().build_dependency(theirs, example_inputs=x)
        layer = theirs.get_submodule(group.name)
        prune = (
            tp.prune_linear_out_channels
            if isinstance(layer, nn.Linear)
            else tp.prune_conv_out_channels
        )
        excluded = (~keep[group.name]).nonzero().squeeze(1).tolist()
        found.get_pruning_group(layer, prune, idxs=excluded).prune()
    assert count_parameters(theirs) == count_parameters(ours)
    assert count_macs(theirs, x) == count_macs(ours, x)
    with torch.no_grad():
        assert torch.allclose(theirs(x), ours(x), atol=1e-5)
    own_shapes = {name: value.shape for name, value in ours.named_parameters()}
    assert {name: value.shape for name, value in theirs.named_parameters()} == own_shapes
