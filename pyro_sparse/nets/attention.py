"""Attention from plain linear layers, whose number of heads is free of the embedding's width."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "NarrowAttention"]


class Attention(nn.Module):
    """Multi-head attention without masks; the heads' width times their number may be any number.

    Computes what ``nn.MultiheadAttention`` does in eval mode, and returns the same pair, whose
    second part (the attention's weights) is None. ``torch.fx`` traces it.

    Args:
        width: of queries, keys, values, ``(..., width)``.
        heads: how many.
        head_width: of one.
        outputs: width of the output; ``width`` by default.
        batch_first: whether inputs are ``(batch, tokens, width)`` or ``(tokens, batch, width)``.
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


class NarrowAttention(nn.MultiheadAttention):
    """Torch's attention with some of its heads gone, which it cannot express itself.

    Its parameters have torch's names; their inner width is that of the heads that are left, the
    embedding keeps its own.

    Args:
        full: the attention, whose parameters have been cut already.
        heads: how many are left.
    """

    def __init__(self, full: nn.MultiheadAttention, heads: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in vars(full).items() if not k.startswith("_forward")})
        self._parameters = dict(full._parameters)
        self._modules = dict(full._modules)
        self.num_heads = heads
        # Torch's layers would take a short cut through their own code otherwise.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        inputs = [query, key, value]
        if not self.batch_first and query.dim() == 3:
            inputs = [part.transpose(0, 1) for part in inputs]
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        # (..., heads, tokens, head width)
        heads, keys, values = [
            F.linear(part, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for part, weight, bias in zip(inputs, weights, biases, strict=True)
        ]
        mask = attn_mask
        if mask is not None and mask.dim() == 3:  # (batch · heads, ...), the same for all heads
            mask = mask.unflatten(0, (len(inputs[0]), -1))[:, :1]
        masks = [] if mask is None else [mask]
        if key_padding_mask is not None:
            masks.append(key_padding_mask.unsqueeze(-2).unsqueeze(-2))
        if masks and all(part.dtype == torch.bool for part in masks):
            mask = ~functools.reduce(torch.logical_or, masks)  # where to look, not where not to
        elif masks:
            added = [
                torch.zeros_like(part, dtype=query.dtype).masked_fill(part, -torch.inf)
                if part.dtype == torch.bool
                else part
                for part in masks
            ]
            mask = functools.reduce(torch.add, added)
        attended = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
        output = self.out_proj(attended.transpose(-3, -2).flatten(-2))
        if not self.batch_first and query.dim() == 3:
            output = output.transpose(0, 1)
        return output, None
