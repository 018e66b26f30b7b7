"""The guide of BC-GNJ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.models import GroupNormalJeffreys as Model
from pyro_sparse.ranges import positive

from .base import GroupGuide
from .families import NormalFamily, check_draws
from .offer import Offer

__all__ = ["GroupNormalJeffreys"]


class GroupNormalJeffreys(GroupGuide):
    r"""Guide of :class:`pyro_sparse.models.GroupNormalJeffreys`.

    .. math:: z_j ∼ N(μ_{z_j}, σ_{z_j}²), \qquad \tilde w_j ∼ N(μ_j, \text{diag } σ_j²)

    The KL of z_j is a function of the dropout rate :math:`α_j = σ_{z_j}² / μ_{z_j}²` alone, see
    :class:`~pyro_sparse.distributions.NormalJeffreys`.

    Args:
        variance: ``"full"`` (one a weight; the paper's family), ``"tied"`` (σ_ji = u_j v_i,
            which holds units that are out above a KL of 0 where those that are in need other v_i),
            or another of :class:`~pyro_sparse.guides.families.GaussianRows`.
        initial_scale: initial σ of every weight's :math:`\tilde w`, or ``"balanced"``: by layer,
            see :func:`~pyro_sparse.guides.base.balanced_scales`.
        initial_unit_scale: initial σ_z of every unit; μ_z starts at 1.
        scale_draws: ``"batch"``: one draw of z a unit for the whole batch; ``"example"``: one an
            example, in :class:`pyro_sparse.infer.ELBO` (stock Pyro draws one for the batch).

    Raises:
        ValueError: for an unknown option or a number out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        variance: str = "full",
        initial_scale: float | str = "balanced",
        initial_unit_scale: float = 0.05,
        scale_draws: str = "batch",
    ) -> None:
        super().__init__(model)
        positive(initial_unit_scale=initial_unit_scale)
        check_draws(scale_draws=scale_draws)
        self.scale_draws = scale_draws
        self.make_rows(model, variance, initial_scale)
        self.unit_scales: Any = nn.ModuleDict()  # NormalFamily by group
        names = [group.name for group in self._groups if group.prunable]
        for name in [*names, *(["input"] if model.prune_inputs else [])]:
            start = torch.ones_like(model.output_scale).expand(model.graph[name].size)
            self.unit_scales[name.replace(".", "/")] = NormalFamily(start, initial_unit_scale)

    def unit_scale(self, name: str) -> NormalFamily:
        """The law of the scales of the units of group ``name``."""
        return self.unit_scales[name.replace(".", "/")]

    def sample_scales(self, name: str) -> None:
        # A layer that is applied more than once sees one draw.
        alone = not any(group.shared for group in self._groups if group.name == name)
        by_example = alone and self.scale_draws == "example"
        self.sample_units(f"{name}.scale", name, self.unit_scale(name)(), by_example=by_example)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        for group, family in self.layers():
            if group.prunable:
                self.sample_scales(group.name)
            self.sample_rows(group, family)
        if "input" in self.unit_scales:
            self.sample_scales("input")
        self.sample_likelihood()

    def offers(self) -> dict[str, Offer]:
        """With ``log_alpha``: log variance over squared mean of each unit's scale."""
        rates = Offer("retention (−log α)", self._log_alpha, measure=torch.neg, cut=0.0)
        return {**({"log_alpha": rates} if len(self.unit_scales) else {}), **super().offers()}

    def _log_alpha(self) -> dict[str, Tensor]:
        return {
            name.replace("/", "."): log_alpha(family.loc, family.log_scale).detach()
            for name, family in self.unit_scales.items()
        }

    def scales(self) -> dict[str, Tensor]:
        """E z = μ_z."""
        return {g.name: self.unit_scale(g.name).loc for g in self._groups if g.prunable}

    def squared_scales(self) -> dict[str, Tensor]:
        """E z² = μ_z² + σ_z²."""
        squares = {}
        for group in self._groups:
            if group.prunable:
                family = self.unit_scale(group.name)
                squares[group.name] = family.loc.square() + (2 * family.log_scale).exp()
        return squares

    def mean_input(self) -> Tensor | None:
        """E z of the input features."""
        return self.unit_scale("input").loc if "input" in self.unit_scales else None


def log_alpha(loc: Tensor, log_scale: Tensor) -> Tensor:
    """log σ² − log μ², in float64: the square of a μ near 0 underflows."""
    return 2 * (log_scale.double() - loc.double().abs().log())
