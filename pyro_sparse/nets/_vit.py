"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._mlp import activation_module
from .attention import Attention

__all__ = ["vit"]


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, width // heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation_module(activation)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed)[0]
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches become tokens; the tokens' average is classified."""

    def __init__(
        self,
        size: int,
        patch: int,
        in_channels: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        tokens = (size // patch) ** 2
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, hidden, activation) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.out(self.norm(self.blocks(tokens)).mean(1))


def vit(
    activation: str = "gelu",
    *,
    in_channels: int = 3,
    classes: int = 10,
    size: int = 32,
    patch: int = 4,
    width: int = 192,
    depth: int = 6,
    heads: int = 6,
    hidden: int = 384,
) -> VisionTransformer:
    """A vision transformer for square images: average pooling, no class token.

    The heads of each attention and the hidden units of each perceptron can be removed; the width
    of the stream cannot, since layer normalisations mix it.

    Source: Dosovitskiy et al., ICLR 2021; without a class token as Beyer et al., arXiv 2205.01580.

    Args:
        activation: one of :data:`pyro_sparse.nets.ACTIVATIONS`.
        size: height and width of the images, in pixels.
        patch: of a patch; a divisor of ``size``.
        width: of a token.
        hidden: units of the perceptrons.

    Raises:
        ValueError: where patches do not tile the image, or heads do not divide the width.
    """
    if size % patch:
        raise ValueError(f"expected patches that tile {size}×{size} images, got {patch}×{patch}")
    if width % heads:
        raise ValueError(f"expected heads that divide the width {width}, got {heads}")
    return VisionTransformer(
        size, patch, in_channels, classes, width, depth, heads, hidden, activation
    )
