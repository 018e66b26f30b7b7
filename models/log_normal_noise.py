"""SBP: structured Bayesian pruning, a log-normal multiplicative noise on units."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.distributions import LogUniform

from .deterministic import Deterministic

__all__ = ["LogNormalNoise"]


class LogNormalNoise(Deterministic):
    r"""A multiplicative noise on every unit's output; weights are point estimates (SBP).

    For unit ``j`` of a layer, with its incoming weights and bias as the row :math:`w_j`:

    .. math::
        \log θ_j ∼ U[a, b], \qquad h_j = f(θ_j (w_j · x)).

    Where the layer's output is normalised, the noise multiplies the normalisation's scale and
    shift: before it, it would be divided out again. With ``prune_inputs`` every input feature is
    multiplied by a noise, too. Sites: ``{group}.rows`` (point estimates), ``{group}.noise``
    (:math:`θ`), ``input.noise``.

    Args:
        low: :math:`a`, the lower end of log θ.
        high: :math:`b`, the upper end of log θ.
        prior_scale: σ of the weights' prior N(0, σ²), which is weight decay, or None for a flat
            prior.

    Raises:
        ValueError: for bounds out of order; for ``prune_inputs`` where the first layer does not
            read the input directly, so that no weights can take up the noise's mean.

    Further parameters: see :class:`~pyro_sparse.models.base.SparseModel`.
    Source: Neklyudov, Molchanov, Ashukha, Vetrov, NeurIPS 2017, arXiv 1705.07283.
    """

    not_taken: tuple[str, ...] = ("output_scale", "input_inclusion_probability")

    def __init__(
        self,
        net: nn.Module,
        example: Tensor,
        *,
        low: float = -20.0,
        high: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(net, example, **shared)
        if not -float("inf") < low < high < float("inf"):
            raise ValueError(f"expected finite bounds with low < high, got {low} and {high}")
        self.register_constant("low", low)
        self.register_constant("high", high)
        if self.prune_inputs:
            self.check_input_scale()

    def noise(self, name: str) -> Tensor:
        """``{name}.noise``, ``(units,)``."""

        def make() -> TorchDistributionMixin:
            size = self.graph[name].size
            prior = LogUniform(self.low.expand(size), self.high.expand(size))
            return self.support.law(name, prior).to_event(1)

        site = f"{name}.noise"
        return pyro.sample(site, self.fixed_law(site, make))

    def rows(self) -> dict[str, Tensor]:
        rows = super().rows()
        for group in self.layers:
            if group.prunable:
                theta = self.noise(group.name)
                rows[group.name] = self.graph.gate_rows(group.name, rows[group.name], theta)
        return rows

    def input_gate(self) -> Tensor | None:
        return self.noise("input") if self.prune_inputs else None
