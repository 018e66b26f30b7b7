"""BC-GHS: Bayesian compression by a group horseshoe."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .half_cauchy import HalfCauchyModel

__all__ = ["GroupHorseshoe"]


class GroupHorseshoe(HalfCauchyModel):
    r"""A group horseshoe on every unit's row (BC-GHS), non-centred, without a spike.

    For unit ``j`` of layer ``l``, with its incoming weights and bias as the row :math:`w_j`:

    .. math::
        s_l ∼ C^+(0, τ_0), \qquad τ_j ∼ C^+(0, τ_1), \qquad
        \tilde w_j ∼ N(0, I), \qquad w_j = s_l τ_j \tilde w_j.

    Each layer has a global scale :math:`s_l` of its own: weights of different layers differ in
    size by their fan-in, and a scale for the whole network would leave that to the local ones.
    With ``prune_inputs`` the input features are one more such layer: feature ``i`` is multiplied by
    :math:`s τ_i`, which scales the columns of the first layer.
    Sites: ``{group}.global_scale`` (two factors), ``{group}.local_scale`` (factors, last axis 2)
    and ``{group}.rows`` (:math:`\tilde w_j`); ``input.global_scale`` and ``input.local_scale``.
    Layers that are never pruned have rows N(0, output_scale²).

    Args:
        global_scale: :math:`τ_0`; small values (1e-5, as recalled of the paper) ask for few
            units a layer, at a price that grows with :math:`\log 1/τ_0` only.
        local_scale: :math:`τ_1`.
        regularisation: ``c``, the largest scale a unit can have; ∞, the plain horseshoe, is the
            paper's.

    Raises:
        ValueError: for a scale that is not positive; for ``prune_inputs`` where the first layer
            does not read the input directly, so that no weights can take up the scale's mean.

    Further parameters: see :class:`~pyro_sparse.models.base.SparseModel`.
    Source: Louizos, Ullrich, Welling, NeurIPS 2017, arXiv 1705.08665, section 4.2.
    """

    not_taken: tuple[str, ...] = ("input_inclusion_probability",)

    def __init__(
        self,
        net: nn.Module,
        example: Tensor,
        *,
        global_scale: float = 1e-5,
        local_scale: float = 1.0,
        regularisation: float = math.inf,
        **shared: Any,
    ) -> None:
        super().__init__(
            net,
            example,
            global_scale=global_scale,
            local_scale=local_scale,
            regularisation=regularisation,
            **shared,
        )
        if self.prune_inputs:
            self.check_input_scale()

    def unit_scales(self, name: str) -> Tensor:
        r""":math:`s_l τ_j`, ``(units,)``."""
        return self.sample_scales(name, self.sample_global_scale(f"{name}.global_scale"))

    def rows(self) -> dict[str, Tensor]:
        rows = {}
        for group in self.layers:
            if group.prunable:
                scale = self.unit_scales(group.name)
                rows[group.name] = self.gaussian_rows(group, 1.0) * scale.unsqueeze(-1)
            else:
                rows[group.name] = self.gaussian_rows(group)
        return rows

    def input_gate(self) -> Tensor | None:
        return self.unit_scales("input") if self.prune_inputs else None
