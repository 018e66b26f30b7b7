"""BC-GNJ: Bayesian compression by a group normal-Jeffreys prior."""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor, nn

from pyro_sparse.distributions import NormalJeffreys

from .base import SparseModel

__all__ = ["GroupNormalJeffreys"]


class GroupNormalJeffreys(SparseModel):
    r"""A scale with Jeffreys' prior on every unit's row (BC-GNJ), non-centred.

    For unit ``j``, with its incoming weights and bias as the row :math:`w_j`:

    .. math::
        p(z_j) ∝ 1 / |z_j|, \qquad \tilde w_j ∼ N(0, I), \qquad w_j = z_j \tilde w_j,

    hence :math:`w_j \mid z_j ∼ N(0, z_j² I)`. The paper's guide :math:`q(w_j \mid z_j) =
    N(z_j μ_j, z_j² σ_j²)` has the same KL in both forms, because
    :math:`\text{KL}(N(zμ, z²σ²) ‖ N(0, z²))` does not depend on z.
    With ``prune_inputs`` every input feature is multiplied by such a scale, which scales the
    columns of the first layer. Sites: ``{group}.scale`` (:math:`z`), ``{group}.rows``
    (:math:`\tilde w_j`), ``input.scale``. The prior of z is improper: the model has no prior draws.
    Layers that are never pruned have rows N(0, output_scale²).

    Raises:
        ValueError: for ``prune_inputs`` where the first layer does not read the input directly,
            so that no weights can take up the scale's mean.

    Parameters: see :class:`~pyro_sparse.models.base.SparseModel`.
    Source: Louizos, Ullrich, Welling, NeurIPS 2017, arXiv 1705.08665, section 4.1.
    """

    not_taken: tuple[str, ...] = ("input_inclusion_probability",)

    def __init__(self, net: nn.Module, example: Tensor, **shared: Any) -> None:
        super().__init__(net, example, **shared)
        if self.prune_inputs:
            self.check_input_scale()

    def unit_scales(self, name: str) -> Tensor:
        """``{name}.scale``, ``(units,)``."""
        law = self.support.law(name, NormalJeffreys((self.graph[name].size,)))
        return pyro.sample(f"{name}.scale", law.to_event(1))

    def rows(self) -> dict[str, Tensor]:
        rows = {}
        for group in self.layers:
            if group.prunable:
                z = self.unit_scales(group.name)
                w = self.gaussian_rows(group, 1.0)
                rows[group.name] = self.graph.gate_rows(group.name, w, z)
            else:
                rows[group.name] = self.gaussian_rows(group)
        return rows

    def input_gate(self) -> Tensor | None:
        return self.unit_scales("input") if self.prune_inputs else None
