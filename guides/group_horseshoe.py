"""The guide of BC-GHS."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_sparse.models import GroupHorseshoe as Model
from pyro_sparse.models.half_cauchy import HalfCauchyModel

from .families import LogNormalFamily
from .half_cauchy import HalfCauchyGuide, settled_factors
from .offer import Offer

__all__ = ["GroupHorseshoe"]


class GroupHorseshoe(HalfCauchyGuide):
    r"""Guide of :class:`pyro_sparse.models.GroupHorseshoe`.

    Gaussians on the non-centred rows, and mean-field log-normals on the two factors of each squared
    half-Cauchy scale. A unit that the data do not need has :math:`\tilde w_j` at its prior, which
    costs nothing, and pays about :math:`-\log ρ_j` nats for a scale ρ_j that silences it.

    Args:
        variance: ``"full"`` (one a weight; the paper's family), ``"tied"`` (σ_ji = u_j v_i,
            which holds units that are out above a KL of 0 where those that are in need other v_i),
            or another of :class:`~pyro_sparse.guides.families.GaussianRows`.
        initial_scale: initial σ of every :math:`\tilde w_{ji}`, that is, relative to the unit's
            scale, or ``"balanced"``: by layer, see
            :func:`~pyro_sparse.guides.base.balanced_scales`.
        initial_unit_scale: initial median of every unit's scale :math:`s_l τ_j`, or ``"rows"``:
            the root mean square of the unit's weights in the network, so that :math:`\tilde w_j`
            starts where its prior has it. Input features start at 1.
        initial_log_scale: initial standard deviation of the factors' logs.

    Raises:
        ValueError: for an unknown option or a number out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        variance: str = "full",
        initial_scale: float | str = 0.1,
        initial_unit_scale: float | str = "rows",
        initial_log_scale: float = 0.1,
    ) -> None:
        super().__init__(model)
        if initial_unit_scale != "rows" and not (
            isinstance(initial_unit_scale, int | float) and initial_unit_scale > 0
        ):
            raise ValueError(
                f"expected a positive initial_unit_scale or 'rows', got {initial_unit_scale!r}"
            )
        self.make_rows(model, variance, initial_scale)
        rows = model.initial_rows()
        like = model.global_scale

        def log_scales(name: str, size: int) -> Tensor:
            if name == "input":
                return torch.zeros_like(like).expand(size)
            if not isinstance(initial_unit_scale, str):
                return torch.full_like(like, math.log(initial_unit_scale)).expand(size)
            # A unit whose weights are all 0 starts small, not at −∞.
            return rows[name].square().mean(1).clamp_min(1e-12).log() / 2

        # The layer's scale is the geometric mean of its units' scales.
        self.make_scales(
            model,
            lambda name, size: settled_factors(
                log_scales(name, size) - log_scales(name, size).mean(), model.local_scale
            ),
            initial_log_scale,
        )
        self.global_scale: Any = nn.ModuleDict()  # LogNormalFamily by group
        for name in self.scaled_groups(model):
            mean = log_scales(name, model.graph[name].size).mean()
            self.global_scale[name.replace(".", "/")] = LogNormalFamily(
                settled_factors(mean, model.global_scale), initial_log_scale, event_dim=1
            )
        self.match_network()
        if model.prune_inputs:
            self._match_inputs(model)

    def scaled_groups(self, model: HalfCauchyModel) -> list[str]:
        names = super().scaled_groups(model)
        return [*names, "input"] if model.prune_inputs else names

    def global_family(self, name: str) -> LogNormalFamily:
        return self.global_scale[name.replace(".", "/")]

    def sample_scales(self, name: str) -> None:
        pyro.sample(f"{name}.global_scale", self.global_family(name)())
        self.sample_units(f"{name}.local_scale", name, self.local_family(name)())

    def forward(self, *args: Any, **kwargs: Any) -> None:
        for group, family in self.layers():
            if group.prunable:
                self.sample_scales(group.name)
            self.sample_rows(group, family)
        if "input" in self.local_scale:
            self.sample_scales("input")
        self.sample_likelihood()

    def offers(self) -> dict[str, Offer]:
        """With ``log_scales``: posterior mean of the log of each unit's scale."""
        scales = Offer("scale of the unit", self._log_scales, cut=-2.0, relative=True)
        return {**({"log_scales": scales} if len(self.local_scale) else {}), **super().offers()}

    def _log_scales(self) -> dict[str, Tensor]:
        names = [name.replace("/", ".") for name in self.local_scale]
        return {name: self.log_scale_moments(name)[0].detach() for name in names}

    def mean_input(self) -> Tensor | None:
        """E ρ of the input features."""
        if "input" not in self.local_scale:
            return None
        return self.expected_scale("input", lambda scale: scale)

    def _match_inputs(self, model: Model) -> None:
        """Divide the first layer's columns by the inputs' initial scales."""
        rows = {group.name: family.loc for group, family in self.layers()}
        inverse = self.expected_scale("input", lambda scale: scale).reciprocal()
        with torch.no_grad():
            parameters = model.graph.scale_columns(model.graph.parameters(rows), "input", inverse)
            for group, family in self.layers():
                family.loc.copy_(model.graph.rows(parameters, group.name))
