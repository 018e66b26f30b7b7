"""Attention from plain linear layers, whose number of heads is free of the embedding's width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention"]


class Attention(nn.Module):
    """Multi-head attention without masks; the heads' width times their number may be any number.

    Computes what ``nn.MultiheadAttention`` does in eval mode, and returns the same pair, whose
    second part (the attention's weights) is None. ``torch.fx`` traces it.

    :param width: of queries, keys, values, ``(..., width)``.
    :param heads: how many.
    :param head_width: of one.
    :param outputs: width of the output; ``width`` by default.
    :param batch_first: whether inputs are ``(batch, tokens, width)`` or ``(tokens, batch, width)``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        outputs: int | None = None,
        bias: bool = True,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.head_width, self.batch_first = heads, head_width, batch_first
        self.query = nn.Linear(width, heads * head_width, bias=bias)
        self.key = nn.Linear(width, heads * head_width, bias=bias)
        self.value = nn.Linear(width, heads * head_width, bias=bias)
        self.out = nn.Linear(heads * head_width, outputs or width, bias=bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        parts = []
        for layer, inputs in ((self.query, query), (self.key, key), (self.value, value)):
            part = layer(inputs).unflatten(-1, (self.heads, self.head_width))
            # (..., heads, tokens, head width)
            parts.append(part.transpose(-3, -2) if self.batch_first else part.movedim(0, -2))
        attended = F.scaled_dot_product_attention(*parts)
        first = self.batch_first
        attended = attended.transpose(-3, -2) if first else attended.movedim(-2, 0)
        return self.out(attended.flatten(-2)), None
