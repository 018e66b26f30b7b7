"""BMR: a Gaussian prior on every weight, made to be reduced."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.graph import Group
from pyro_sparse.ranges import positive

from .base import SparseModel

__all__ = ["ReducibleGaussian"]


class ReducibleGaussian(SparseModel):
    r"""Independent Gaussians on all weights, whose prior can be reduced to a point at 0 (BMR).

    .. math:: w_{ji} ∼ N(0, s_0²) \quad\text{or, once reduced,}\quad w_{ji} = 0.

    The posterior under the full prior says what each reduction would do to the evidence
    (:func:`pyro_sparse.posterior.reduction.delta_evidence`), without another fit; what it is for is
    taken out with :meth:`pyro_sparse.posterior.Posterior.prune`, single weights of all layers, the
    output's included. Sites: ``{group}.rows``.

    Args:
        prior_scale: :math:`s_0`.

    Raises:
        ValueError: for ``prune_inputs``: an input feature goes when no weight reads it.

    Further parameters: see :class:`~pyro_sparse.models.base.SparseModel`.
    Source: Beckers, van Erp, Zhao, Kondrashov, de Vries, arXiv 2210.09134.
    """

    not_taken: tuple[str, ...] = ("output_scale", "prune_inputs", "input_inclusion_probability")

    def __init__(
        self, net: nn.Module, example: Tensor, *, prior_scale: float = 1.0, **shared: Any
    ) -> None:
        super().__init__(net, example, **shared)
        positive(prior_scale=prior_scale)
        if self.prune_inputs:
            raise ValueError(
                "ReducibleGaussian has no gate on the inputs: a feature goes by itself when all "
                "weights that read it are pruned; pass prune_inputs=False"
            )
        self.register_constant("prior_scale", prior_scale)

    def support_shapes(self) -> dict[str, tuple[int, ...]]:
        return {group.name: tuple(self.row_shape(group)) for group in self.layers}

    def reducible_rows(self, group: Group) -> Tensor:
        """``{group}.rows``: independent ``N(0, s₀²)``, each of which may go."""

        def make() -> TorchDistributionMixin:
            zero = torch.zeros_like(self.prior_scale)
            prior = dist.Normal(zero, self.prior_scale).expand(self.row_shape(group))
            return self.support.law(group.name, prior).to_event(2)

        site = f"{group.name}.rows"
        return pyro.sample(site, self.fixed_law(site, make))

    def rows(self) -> dict[str, Tensor]:
        return {group.name: self.reducible_rows(group) for group in self.layers}
