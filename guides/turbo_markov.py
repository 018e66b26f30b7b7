"""The guide of Turbo-VBI: closed-form updates of precisions and supports between SVI steps."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.distributions import MarkovChain
from pyro_sparse.graph import Group
from pyro_sparse.models import TurboMarkov as Model
from pyro_sparse.models.base import positive

from .base import GroupGuide, balanced_scales, key
from .families import GaussianRows

__all__ = ["TurboMarkov"]


class Hierarchy(nn.Module):
    r"""q(s) and q(ρ) of one layer, and their coordinate updates.

    .. math::
        ρ_j &∼ \text{Gamma}(π_j a + (1 − π_j) \bar a + \tfrac{m_j}{2},\;
            π_j b + (1 − π_j) \bar b + \tfrac12 Σ_i E w_{ji}²) \\
        q(s) &∝ p(s) \exp(Σ_j e_j s_j), \qquad
            e_j = E[\log p(ρ_j \mid s_j = 1) − \log p(ρ_j \mid s_j = 0)]

    with the marginals π of q(s), by sum-product. Both are the exact maximisers of the evidence
    lower bound given the rest. They are buffers: constants between two updates.
    """

    shape: Tensor
    rate: Tensor
    initial_logits: Tensor
    transition_logits: Tensor

    def __init__(self, model: Model, group: Group, probability: Tensor) -> None:
        super().__init__()
        # A tuple hides the model from nn.Module: its buffers are not the guide's.
        self._model, self._group = (model,), group
        ones = torch.ones_like(model.density).expand(model.row_shape(group))
        self.register_buffer("sizes", self._sum(ones))
        chain = model.chain(group)
        logit = torch.logit(probability)
        self.register_buffer("initial_logits", logit.expand(chain.batch_shape).clone())
        self.register_buffer(
            "transition_logits", logit.expand(chain.transition_logits.shape).clone()
        )
        self.register_buffer("shape", self.sizes.clone())
        self.register_buffer("rate", self.sizes.clone())

    def _sum(self, weights: Tensor) -> Tensor:
        """Sums over the blocks of ``(units, row length)``, or over whole rows."""
        size = self._model[0].block_size
        if size is None:
            return weights.sum(-1)
        padded = nn.functional.pad(weights, (0, -weights.shape[-1] % size))
        return padded.unflatten(-1, (-1, size)).sum(-1)

    def support(self) -> MarkovChain:
        """q(s)."""
        return MarkovChain(self.initial_logits, self.transition_logits)

    def precision(self) -> dist.Gamma:
        """q(ρ)."""
        return dist.Gamma(self.shape, self.rate)

    @torch.no_grad()
    def update_precision(self, second_moments: Tensor) -> None:
        """q(ρ) given q(s) and :math:`E w²`, ``(units, row length)``."""
        on, off = self._model[0].gammas(self._group)
        pi = self.support().mean
        self.shape.copy_(
            pi * on.concentration + (1 - pi) * off.concentration + 0.5 * self.sizes
        )
        self.rate.copy_(pi * on.rate + (1 - pi) * off.rate + 0.5 * self._sum(second_moments))

    @torch.no_grad()
    def update_support(self) -> None:
        """q(s) given q(ρ)."""
        model, group = self._model[0], self._group
        chain = model.chain(group).condition(self.evidence())
        self.initial_logits.copy_(chain.initial_logits)
        self.transition_logits.copy_(chain.transition_logits)

    def evidence(self) -> Tensor:
        """:math:`e_j`, of the shape of s."""
        on, off = self._model[0].gammas(self._group)
        mean_log = torch.digamma(self.shape) - self.rate.log()
        mean = self.shape / self.rate
        return _expected_log_gamma(on, mean_log, mean) - _expected_log_gamma(off, mean_log, mean)


def _expected_log_gamma(law: dist.Gamma, mean_log: Tensor, mean: Tensor) -> Tensor:
    """E log Gamma(ρ; shape, rate), less E of −log ρ, which cancels in ratios."""
    a, b = law.concentration, law.rate
    return a * b.log() - torch.lgamma(a) + a * mean_log - b * mean


class TurboMarkov(GroupGuide):
    r"""Guide of :class:`pyro_sparse.models.TurboMarkov`.

    .. math::
        q = \prod_{layers} q(s)\, \prod_j \text{Gamma}(ρ_j; \hat a_j, \hat b_j)\,
            \prod_{ji} N(w_{ji}; μ_{ji}, σ_{ji}²)

    q(w) is trained by SVI. q(ρ) and q(s), in :class:`Hierarchy`, are set to their optimum given
    q(w) every ``update_every`` calls in training mode, so the alternation needs no hook and runs
    under :func:`pyro_sparse.fit` and stock ``pyro.infer.SVI`` alike. At an optimum the bound is
    stationary in them, so q(w)'s gradient with both held fixed is that of the bound with both
    maximised out. In eval mode they are left as they are.

    :param variance: of q(w): ``"tied"`` (σ_ji = u_j v_i) or ``"full"``.
    :param initial_scale: initial σ of every weight, or ``"balanced"``, see
        :func:`~pyro_sparse.guides.base.balanced_scales`.
    :param initial_inclusion: initial probability of being in, of every unit or block.
    :param update_every: training calls between two updates of q(ρ) and q(s).
    :raises ValueError: for an unknown option or a number out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        variance: str = "tied",
        initial_scale: float | str = "balanced",
        initial_inclusion: float = 0.99,
        update_every: int = 1,
    ) -> None:
        super().__init__(model)
        if variance not in ("tied", "full"):
            raise ValueError(f"expected variance 'tied' or 'full', got {variance!r}")
        if isinstance(initial_scale, str):
            if initial_scale != "balanced":
                raise ValueError(
                    f"expected a positive initial_scale or 'balanced', got {initial_scale!r}"
                )
        else:
            positive(initial_scale=initial_scale)
        if not 0 < initial_inclusion < 1:
            raise ValueError(f"expected initial_inclusion in (0, 1), got {initial_inclusion}")
        if update_every < 1:
            raise ValueError(f"expected update_every of at least 1, got {update_every}")
        self.update_every = update_every
        self._spread = model.spread
        self._blocks = model.block_size is not None
        start = model.initial_rows()
        balanced = balanced_scales(
            [start[group.name].shape[1] for group in self._groups],
            [group.prunable for group in self._groups],
        )
        probability = torch.full_like(model.density, initial_inclusion)
        self.hierarchies: Any = nn.ModuleDict()  # Hierarchy by group
        for group, own in zip(self._groups, balanced, strict=True):
            scale = own if isinstance(initial_scale, str) else float(initial_scale)
            family = GaussianRows(start[group.name], variance, scale)
            self.row_families[key(group)] = family
            if group.prunable:
                hierarchy = Hierarchy(model, group, probability)
                hierarchy.update_precision(self.second_moments(family))
                self.hierarchies[key(group)] = hierarchy
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    @staticmethod
    def second_moments(family: GaussianRows) -> Tensor:
        """:math:`E w²` under q, ``(units, row length)``."""
        slab = family.slab()
        return slab.mean.square() + slab.variance

    @torch.no_grad()
    def update(self) -> None:
        """One round of coordinate updates: q(ρ), then q(s), of every layer."""
        hierarchies = self.hierarchies
        for group, family in self.layers():
            if group.prunable:
                hierarchy = hierarchies[key(group)]
                hierarchy.update_precision(self.second_moments(family))
                hierarchy.update_support()

    def reduced(self) -> None:
        """Pruned units are known to be out; their neighbours hear of it."""
        self.update()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        if self.training:
            if int(self.calls) % self.update_every == 0:
                self.update()
            self.calls.add_(1)
        hierarchies = self.hierarchies
        for group, family in self.layers():
            if group.prunable:
                hierarchy = hierarchies[key(group)]
                self._sample(f"{group.name}.support", group, hierarchy.support())
                self._sample(f"{group.name}.precision", group, hierarchy.precision())
            self.sample_rows(group, family)
        self.sample_rest()

    def _sample(self, site: str, group: Group, law: TorchDistributionMixin) -> None:
        """A site of s or ρ; what belongs to one unit is the event, where units are apart."""
        law = law.to_event(max(0, len(law.batch_shape) - 1))
        if law.batch_shape:
            law = self.support.law(group.name, law).to_event(1)
        pyro.sample(site, law)

    # -- what the posterior reads ----------------------------------------------------------------

    def inclusion_logits(self) -> dict[str, Tensor]:
        """Logits of q(unit is in); with blocks, of q(any of its blocks is in). Float64."""
        logits = {}
        for group in self._groups:
            if group.prunable:
                chain = self.hierarchies[key(group)].support()
                chain = MarkovChain(chain.initial_logits.double(), chain.transition_logits.double())
                own = chain.any_logits if self._blocks else chain.marginal_logits
                out = ~self.support[group.name]
                logits[group.name] = own.masked_fill(out, -float("inf"))
        return logits

    def mean_rows(self) -> dict[str, Tensor]:
        """Posterior means; with blocks, 0 in the blocks that are out (probability ½ or less)."""
        rows = super().mean_rows()
        if self._blocks:
            for group in self._groups:
                if group.prunable:
                    inside = self.hierarchies[key(group)].support().mean > 0.5
                    rows[group.name] = rows[group.name] * self._spread(group, inside)
        return rows
