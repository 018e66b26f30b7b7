"""The guide of Turbo-VBI: closed-form updates of precisions and supports between SVI steps."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.distributions import MarkovChain, TiedNormal
from pyro_sparse.distributions.analytic import square_norms
from pyro_sparse.graph import Group
from pyro_sparse.models import TurboMarkov as Model
from pyro_sparse.models.turbo_markov import select
from pyro_sparse.ranges import whole

from .base import GroupGuide, key
from .families import GaussianRows

__all__ = ["TurboMarkov"]


class Hierarchy(nn.Module):
    r"""q(s) q(ρ | s) of one layer, and its coordinate update.

    With :math:`S_j = Σ_i E w_{ji}²` over the :math:`m_j` weights of unit ``j``, and
    :math:`(a_1, b_1) = (a, b)`, :math:`(a_0, b_0) = (\bar a, \bar b)`:

    .. math::
        q(ρ_j \mid s_j = i) &= \text{Gamma}(a_i + m_j / 2,\; b_i + S_j / 2) \\
        q(s) &∝ p(s) \exp(Σ_j e_j s_j), \qquad e_j = L_1 - L_0, \\
        L_i &= \log \frac{Γ(a_i + m_j/2)}{Γ(a_i)} + a_i \log b_i
               − (a_i + m_j/2) \log(b_i + S_j/2),

    :math:`L_i` being :math:`\log ∫ p(ρ_j \mid s_j = i) \exp E \log p(w_j \mid ρ_j)\, dρ_j` up to
    a constant. Together they are the exact maximiser of the evidence lower bound given q(w). What
    they are computed from stands in buffers: constants between two updates.
    """

    moments: Tensor
    initial_logits: Tensor
    transition_logits: Tensor

    def __init__(self, model: Model, group: Group) -> None:
        super().__init__()
        # A tuple hides the model from nn.Module: its buffers are not the guide's.
        self._model, self._group = (model,), group
        chain = model.chain(group)
        self.register_buffer("moments", model.sizes(group))
        self.register_buffer("initial_logits", chain.initial_logits.clone())
        self.register_buffer("transition_logits", chain.transition_logits.clone())

    def support(self) -> MarkovChain:
        """q(s)."""
        return MarkovChain(self.initial_logits, self.transition_logits)

    def precisions(self) -> tuple[dist.Gamma, dist.Gamma]:
        """q(ρ | s = 1) and q(ρ | s = 0)."""
        model, group = self._model[0], self._group
        half, moment = model.sizes(group) / 2, self.moments / 2
        on, off = (
            dist.Gamma(prior.concentration + half, prior.rate + moment)
            for prior in model.gammas(group)
        )
        return on, off

    def precision(self, s: Tensor) -> dist.Gamma:
        """q(ρ | s)."""
        return select(s, *self.precisions())

    def evidence(self) -> Tensor:
        """:math:`e_j`, of the shape of s."""
        (on, off), (prior_on, prior_off) = self.precisions(), self._model[0].gammas(self._group)
        return _normaliser(prior_on, on) - _normaliser(prior_off, off)

    @torch.no_grad()
    def update(self, moments: Tensor) -> None:
        """q(s) and q(ρ | s) at their optimum given the sums :math:`S`, of the shape of s."""
        model, group = self._model[0], self._group
        self.moments.copy_(moments)
        chain = model.chain(group).condition(self.evidence())
        self.initial_logits.copy_(chain.initial_logits)
        self.transition_logits.copy_(chain.transition_logits)


def _normaliser(prior: dist.Gamma, posterior: dist.Gamma) -> Tensor:
    """log of the integral of a Gamma's prior times its likelihood, in float64."""
    a, b = prior.concentration.double(), prior.rate.double()
    shape, rate = posterior.concentration.double(), posterior.rate.double()
    value = torch.lgamma(shape) - torch.lgamma(a) + a * b.log() - shape * rate.log()
    return value.to(prior.rate.dtype)


class TurboMarkov(GroupGuide):
    r"""Guide of :class:`pyro_sparse.models.TurboMarkov`.

    .. math::
        q = \prod_{layers} q(s) \prod_j q(ρ_j \mid s_j) \prod_{ji} N(w_{ji}; μ_{ji}, σ_{ji}²)

    q(w) is trained by SVI. q(s) and q(ρ | s), in :class:`Hierarchy`, are set to their optimum given
    q(w) every ``update_every`` calls in training mode, so the alternation needs no hook and runs
    under :func:`pyro_sparse.fit` and stock ``pyro.infer.SVI`` alike. At an optimum the bound is
    stationary in them, so q(w)'s gradient with both held fixed is that of the bound with both
    maximised out. In eval mode they are left as they are.

    Args:
        variance: of q(w), see :class:`~pyro_sparse.guides.families.GaussianRows`.
        initial_scale: initial σ of every weight, or ``"balanced"``, see
            :func:`~pyro_sparse.guides.base.balanced_scales`.
        update_every: training calls between two updates of q(s) and q(ρ | s).

    Raises:
        ValueError: for an unknown option or a number out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        variance: str = "tied",
        initial_scale: float | str = "balanced",
        update_every: int = 1,
    ) -> None:
        super().__init__(model)
        whole(update_every=update_every)
        self.update_every = update_every
        self._spread = model.spread
        self._blocks = model.block_size is not None
        self._block_sums = model.block_sums
        self.make_rows(model, variance, initial_scale)
        self.hierarchies: Any = nn.ModuleDict()  # Hierarchy by group
        for group in self._groups:
            if group.prunable:
                self.hierarchies[key(group)] = Hierarchy(model, group)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.update()

    @staticmethod
    def second_moments(family: GaussianRows) -> Tensor:
        """:math:`E w²` under q, ``(units, row length)``."""
        slab = family.slab()
        return slab.mean.square() + slab.variance

    def moments(self, family: GaussianRows) -> Tensor:
        """:math:`S`, sums of :math:`E w²` over rows or blocks."""
        if self._blocks:
            return self._block_sums(self.second_moments(family))
        slab: Any = family.slab()
        if isinstance(slab, TiedNormal):
            return slab.variance_sums() + square_norms(slab.loc)
        return square_norms(slab.mean) + square_norms(slab.stddev)

    @torch.no_grad()
    def update(self) -> None:
        """q(s) and q(ρ | s) of every layer at their optimum given q(w)."""
        hierarchies = self.hierarchies
        for group, family in self.layers():
            if group.prunable:
                hierarchies[key(group)].update(self.moments(family))

    def reduced(self) -> None:
        """Pruned units are known to be out; their neighbours hear of it."""
        self.update()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        if self.training:
            # A look at the counter keeps a step from being recorded (infer.tape).
            if self.update_every == 1 or int(self.calls) % self.update_every == 0:
                self.update()
            self.calls.add_(1)
        hierarchies = self.hierarchies
        for group, family in self.layers():
            if group.prunable:
                hierarchy = hierarchies[key(group)]
                s = self._sample(f"{group.name}.support", group, hierarchy.support())
                self._sample(f"{group.name}.precision", group, hierarchy.precision(s))
            self.sample_rows(group, family)
        self.sample_likelihood()

    def _sample(self, site: str, group: Group, law: TorchDistributionMixin) -> Tensor:
        """A site of s or ρ; what belongs to one unit is the event, where units are apart."""
        law = law.to_event(max(0, len(law.batch_shape) - 1))
        if law.batch_shape:
            law = self.support.law(group.name, law).to_event(1)
        return pyro.sample(site, law)

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
