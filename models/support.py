"""Which units, or single weights, a model still has: what was pruned stays out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

__all__ = ["Support"]


class Support(nn.Module):
    """Boolean masks of what is in, shared by a model and its guide.

    Everything is in at first. What :meth:`restrict` takes out is fixed at 0 from then on: it pays
    no KL, and further training goes on without it. The masks are buffers, hence part of
    checkpoints.

    Args:
        shapes: by group: ``(units,)``, or ``(units, row length)`` where single weights may go.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._keys = {name: name.replace(".", "/") for name in shapes}
        for name, shape in shapes.items():
            self.register_buffer(self._keys[name], torch.ones(shape, dtype=torch.bool))
        self.restricted = False

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(self._keys[name])

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Any:
        return iter(self._keys)

    @torch.no_grad()
    def restrict(self, keep: Mapping[str, Tensor]) -> int:
        """Take out what the masks leave out; what was out stays out.

        Args:
            keep: for any of the groups, a boolean mask ``(units,)`` or of the group's own shape.

        Returns:
            how many units or weights were taken out that were in before.

        Raises:
            ValueError: for a group that has no mask, or a mask of another shape or type.
        """
        for name, mask in keep.items():
            if name not in self:
                if bool(mask.all()):
                    continue
                raise ValueError(f"group {name!r} cannot be pruned; there are {', '.join(self)}")
            own = self[name]
            if mask.dtype != torch.bool or tuple(mask.shape) not in {own.shape[:1], own.shape}:
                raise ValueError(
                    f"expected a boolean mask of shape {tuple(own.shape)} or "
                    f"{tuple(own.shape[:1])} for group {name!r}, got {mask.dtype} of shape "
                    f"{tuple(mask.shape)}"
                )
        removed = 0
        for name, mask in keep.items():
            if name in self:
                own = self[name]
                mask = mask.to(own.device).reshape(*mask.shape, *[1] * (own.dim() - mask.dim()))
                removed += int((own & ~mask).sum())
                own &= mask
        self._note()
        return removed

    def units(self, name: str) -> Tensor:
        """``(units,)``: whether anything of the unit is in."""
        mask = self[name]
        return mask if mask.dim() == 1 else mask.any(1)

    def log_prior(self) -> float:
        r"""Log prior probability of this support, nats: what choosing it by the data costs.

        .. math:: \log p(S) = −\log(p + 1) − \log \binom{p}{k}

        for k of p weights (or units) that are in: every size is as probable as any other, and
        every support of a size. A bound of the pruned model, less this, is one on the log evidence
        of the mixture of the models of all supports. 0 while everything is in, where nothing was
        chosen. Without it a bound may exceed the log evidence by what :math:`2^p` supports offer.

        Source: the multiplicity correction of Scott and Berger, Annals of Statistics 38 (2010).
        """
        if not self.restricted:
            return 0.0
        p = sum(self[name].numel() for name in self)
        k = sum(int(self[name].sum()) for name in self)
        choices = math.lgamma(p + 1) - math.lgamma(k + 1) - math.lgamma(p - k + 1)
        return -math.log(p + 1) - choices

    def law(self, name: str, law: TorchDistributionMixin) -> TorchDistributionMixin:
        """``law``, whose batch shape is the mask's, without density or KL for what is out."""
        return law.mask(self[name]) if self.restricted and name in self else law

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """``rows`` ``(units, row length)`` with 0 for what is out."""
        if not self.restricted or name not in self:
            return rows
        mask = self[name].to(rows.dtype)
        return rows * (mask if mask.dim() == 2 else mask.unsqueeze(-1))

    def _note(self) -> None:
        self.restricted = not all(bool(self[name].all()) for name in self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._note()
