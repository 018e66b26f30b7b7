"""MACs as a function of the masks are those of the compact network, to the integer."""

import pytest
import torch
from torch import nn
from torchvision import models as vision

from pyro_sparse import nets
from pyro_sparse.export import compact_network
from pyro_sparse.graph import groups


class Encoder(nn.Module):
    """A transformer's block around torch's own attention."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        self.norm = nn.LayerNorm(12)
        self.fc1, self.fc2, self.out = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        if not self.batch_first:
            x = x.transpose(0, 1)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.out(x.mean(1 if self.batch_first else 0))


def channels():
    """Depthwise, grouped and transposed convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.ConvTranspose2d(12, 6, 2, 2), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, groups=2), nn.ConvTranspose2d(6, 6, 2, groups=6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


SMALL_VIT = {"size": 8, "width": 12, "depth": 2, "heads": 3, "hidden": 8, "classes": 3}
BLOCKS = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48, "num_classes": 5}
CASES = {
    "mlp": (lambda: nets.mlp([6, 9, 7, 3]), (6,)),
    "lenet": (lambda: nets.lenet5_caffe(widths=(3, 4, 8), size=16), (1, 16, 16)),
    "resnet": (lambda: nets.resnet(8, widths=(4, 6, 8), classes=3), (3, 8, 8)),
    "projections": (lambda: nets.resnet(8, widths=(4, 6, 8), option="B"), (3, 8, 8)),
    "vit": (lambda: nets.vit(**SMALL_VIT), (3, 8, 8)),
    "torch's attention": (Encoder, (7, 5)),
    "tokens first": (lambda: Encoder(batch_first=False), (7, 5)),
    "channels": (channels, (3, 8, 8)),
    "mobilenet_v2": (
        lambda: vision.MobileNetV2(4, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 64, 2, 2]]),
        (3, 32, 32),
    ),
    "vision transformer": (
        lambda: vision.VisionTransformer(image_size=32, patch_size=16, **BLOCKS),
        (3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_the_compact_network_counts_them(name):
    make, shape = CASES[name]
    net, x = make().eval(), torch.randn(3, *shape)
    graph, dense = groups(net, x), nets.count_macs(net, x)
    smaller = 0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        keep = {}
        for group in graph:
            if group.prunable and group.writers:
                mask = torch.rand(group.size, generator=generator) < 0.6
                mask[0] = True
                keep[group.name] = mask
        small = compact_network(net, graph, {}, keep)
        assert dense - graph.macs_saved(keep) == nets.count_macs(small, x)
        smaller += graph.macs_saved(keep) > 0
    assert smaller
    assert graph.macs_saved({}) == 0


def test_the_count_does_not_depend_on_the_fused_attention():
    """Which torch takes in eval mode without gradients, and no counter knows."""
    net, x = Encoder().eval(), torch.randn(1, 7, 5)
    tokens, width, hidden = 7, 12, 20
    layers = tokens * (5 * width + 4 * width * width + 2 * width * hidden) + 3 * width
    expected = layers + 2 * tokens * tokens * width
    before = torch.backends.mha.get_fastpath_enabled()
    assert nets.count_macs(net, x) == expected
    assert nets.count_macs(net.requires_grad_(False), x) == expected
    assert torch.backends.mha.get_fastpath_enabled() == before
