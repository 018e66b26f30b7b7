"""The evidence lower bound, computing nothing that it throws away."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import Distribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.elbo import ELBO as PyroELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import MultiFrameTensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions.kl import innermost_law, is_closed
from pyro_sparse.inputs import Several
from pyro_sparse.modules import own_parameters
from pyro_sparse.precision import autocast_suspended
from pyro_sparse.ranges import whole

from .local_reparameterisation import LocalReparameterisation

__all__ = ["ELBO", "Estimate"]


class Estimate(NamedTuple):
    """One Monte Carlo estimate, in nats over the whole data; means over particles.

    loss:           ``kl_weight · kl − log_likelihood``; its gradient is the estimator's
    log_likelihood: of all ``num_data`` examples, as the minibatch estimates it
    kl:             from the prior, unweighted
    """

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor


class _LocalELBOModule(ELBOModule):
    """``ELBO()(model, guide)``: parameters are the modules' own, never the global store's."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with own_parameters(self.model, self.guide):
            return super().forward(*args, **kwargs)


class _Record(Messenger):
    """Records sample sites; with those of a guide, latent ones take their values.

    What tracing and replaying come to in one handler without the graph: a third of a millisecond a
    step of a small network. Subsamples of a plate are drawn once and passed on, but not recorded.

    A latent site's KL is taken where the site is met, as its ``"kl"``, and not at the end: backward
    passes begin with what came last, and would hold all gradients of KLs while those of the
    network's weights are made.
    """

    def __init__(self, guide: _Record | None = None) -> None:
        super().__init__()
        self.sites: dict[str, Any] = {}
        self.subsamples: dict[str, Any] = {}
        self._given = {} if guide is None else {**guide.sites, **guide.subsamples}
        own = [] if guide is None else guide.sites.values()
        self._mapped = any(site["infer"].get("is_auxiliary") for site in own)

    def _pyro_sample(self, msg: Any) -> None:
        given = self._given.get(msg["name"])
        if given is not None and not msg["is_observed"]:
            msg["done"], msg["value"], msg["infer"] = True, given["value"], given["infer"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg
        elif not msg["infer"].get("_do_not_trace"):
            if msg["name"] in self.sites:
                raise ValueError(
                    f"two sample statements are named {msg['name']!r}; give each a name of its own"
                )
            self.sites[msg["name"]] = msg
            given = self._given.get(msg["name"])
            if given is not None and not msg["is_observed"]:
                msg["kl"], msg["kl_terms"] = _site_kl(msg, given, self._mapped)


class ELBO(PyroELBO):
    r"""Negative evidence lower bound, with analytic KL terms wherever they are registered.

    .. math::
        -\text{ELBO} = -E_q[\log p(y \mid θ)] + w Σ_{sites} \text{KL}(q(θ_s) ‖ p(θ_s \mid …))

    The expectation is over draws of the guide; a site's KL is closed given its parents' draws, and
    falls back to ``log q − log p`` at the draw where no KL is registered (`analytic` lists which).
    Unlike :class:`pyro.infer.TraceMeanField_ELBO`, with which it agrees to rounding, no log-density
    of a site with a closed KL is ever evaluated. Auxiliary sites of guides, as Pyro's autoguides
    have them, count by their log-densities at the draw.

    Guide sites with a score term (:class:`~pyro_sparse.distributions.SpikeAndSlab` itself) get an
    unbiased score-function gradient. Its cost is what the site's draw may have moved, by member of
    its plates; with several particles, each one's baseline is the mean of the others'
    (leave-one-out), which keeps it unbiased and lowers its variance.

    Use it as a module with a torch optimiser, ``loss = ELBO()(model, guide); loss(x, y)``, or in
    stock SVI, ``SVI(model, guide, optim, loss=ELBO())``.

    Args:
        num_particles: draws of the guide a step.
        kl_weight: ``w``; 1 is the evidence lower bound. It is a plain attribute, so a warm-up may
            change it between steps.
        local_reparameterisation: sample layers' outputs instead of weights where that is unbiased,
            see :mod:`pyro_sparse.infer.local_reparameterisation`.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        kl_weight: float = 1.0,
        local_reparameterisation: bool = True,
    ) -> None:
        whole(num_particles=num_particles)
        if not isinstance(kl_weight, int | float) or not 0 <= kl_weight < math.inf:
            raise ValueError(f"expected kl_weight to be a number of at least 0, got {kl_weight!r}")
        super().__init__(num_particles=num_particles)
        self.kl_weight = kl_weight
        self.local_reparameterisation = local_reparameterisation

    def __call__(self, model: Any, guide: Any) -> ELBOModule:
        return _LocalELBOModule(model, guide, self)

    # -- the estimator ---------------------------------------------------------------------------

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """One run of each: the sample sites of the model and of the guide, by name."""
        # The first argument is the batch of inputs; without one there is no layer to sample.
        batch: Any = args[0] if args else None
        rows = isinstance(batch, Several) or (isinstance(batch, Tensor) and batch.dim() > 0)
        examples = len(batch) if self.local_reparameterisation and rows else None
        with _Record() as guide_record, LocalReparameterisation(examples):
            guide(*args, **kwargs)
        with _Record(guide_record) as model_record:
            model(*args, **kwargs)
        return model_record.sites, guide_record.sites

    def _particle(
        self, model_sites: dict[str, Any], guide_sites: dict[str, Any]
    ) -> tuple[Tensor, Tensor, list[_Score]]:
        """Log-likelihood, KL and score terms of one draw."""
        likelihoods: list[Any] = []
        kls: list[Any] = []
        own = {name: site for name, site in guide_sites.items() if name not in model_sites}
        extra = [name for name, site in own.items() if not site["infer"].get("is_auxiliary")]
        if extra:
            raise ValueError(
                f"the guide samples {extra}, the model does not; model sites: {list(model_sites)}"
            )
        costs: list[_Cost] = []
        for name, site in own.items():
            # What an autoguide draws before it maps it to the model's latents, which have the
            # mapping's Jacobian as their density.
            value = site["fn"].log_prob(site["value"])
            kls.append(_total(value, site))
            costs.append(_Cost(name, value, site, self.kl_weight))
        for name, site in model_sites.items():
            if site["is_observed"]:
                value = site["fn"].log_prob(site["value"])
                likelihoods.append(_total(value, site))
                costs.append(_Cost(name, value, site, -1.0))
                continue
            guide_site = guide_sites.get(name)
            if guide_site is None:
                raise ValueError(
                    f"the model samples the site {name!r}, the guide does not; guide sites: "
                    f"{list(guide_sites)}"
                )
            kls.append(site["kl"])
            costs += [
                cost._replace(weight=cost.weight * self.kl_weight) for cost in site["kl_terms"]
            ]
        scores = [
            _Score(parts.score_function, _local_cost(site, costs))
            for site in guide_sites.values()
            if _may_have_score(site["fn"])
            and isinstance((parts := site["fn"].score_parts(site["value"])).score_function, Tensor)
        ]
        return _sum(likelihoods), _sum(kls), scores

    def estimate(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Estimate:
        """One estimate of the loss with its terms; see :class:`Estimate`.

        Under ``torch.autocast`` only the network's forward pass is computed in lower precision.
        """
        device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
        with autocast_suspended(device or torch.device("cpu")):
            return self._estimate(model, guide, *args, **kwargs)

    def _estimate(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Estimate:
        draws = [
            self._particle(*self._get_trace(model, guide, args, kwargs))
            for _ in range(self.num_particles)
        ]
        count = len(draws)
        log_likelihood = _mean([torch.as_tensor(draw[0]) for draw in draws])
        # A model without a prior has no KL, a number that lies nowhere.
        there = log_likelihood.device
        kl = _mean([torch.as_tensor(draw[1], device=there) for draw in draws])
        loss = self.kl_weight * kl - log_likelihood
        if not any(scores for _, _, scores in draws):
            return Estimate(loss, log_likelihood, kl)
        surrogate = loss
        for score in zip(*(scores for _, _, scores in draws), strict=True):
            costs = [one.cost for one in score]
            same = count > 1 and len({cost.shape for cost in costs}) == 1
            total = sum(costs[1:], costs[0]) if same else 0.0
            for one in score:
                others = (total - one.cost) / (count - 1) if same else 0.0
                surrogate = surrogate + ((one.cost - others) * one.function).sum() / count
        return Estimate(surrogate + (loss - surrogate).detach(), log_likelihood, kl)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, whose gradient is the estimator's (scores included)."""
        return self.estimate(model, guide, *args, **kwargs).loss

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without a gradient."""
        with torch.no_grad():
            return float(self.estimate(model, guide, *args, **kwargs).loss)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; gradients are added to the parameters' ``grad`` (stock SVI)."""
        loss = self.estimate(model, guide, *args, **kwargs).loss
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def analytic(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> dict[str, bool]:
        """``{latent site: its KL is closed}`` for one run of model and guide."""
        with torch.no_grad(), own_parameters(model, guide):
            model_sites, guide_sites = self._get_trace(model, guide, args, kwargs)
        return {
            name: is_closed(guide_sites[name]["fn"], site["fn"])
            for name, site in model_sites.items()
            if name in guide_sites
        }


def _sum(values: list[Any]) -> Any:
    """Their sum, without one more addition to 0."""
    return functools.reduce(operator.add, values) if values else 0.0


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()


class _Cost(NamedTuple):
    """A term of the loss at the site ``name``, times ``weight``, before its site's scale and mask.

    closed: whether it is a KL, which depends on the site's law but not on its draw
    """

    name: str
    value: Any
    site: Any
    weight: float
    closed: bool = False


class _Score(NamedTuple):
    """A site's score function and the part of the loss that its draw may have moved."""

    function: Tensor
    cost: Tensor


def _local_cost(site: Any, costs: list[_Cost]) -> Tensor:
    """What a draw may have moved: of other members of its plates it has not moved anything.

    A score function belongs to the estimator, not to the model, so that no scale or mask is on it.
    """
    terms = MultiFrameTensor()
    for cost in costs:
        if not (cost.closed and cost.name == site["name"]):
            value = torch.as_tensor(cost.value).detach()
            value = scale_and_mask(value, cost.site["scale"], cost.site["mask"])
            terms.add((cost.site["cond_indep_stack"], cost.weight * value))
    return torch.as_tensor(_summed(terms, site), device=site["value"].device)


def _summed(terms: MultiFrameTensor, site: Any) -> Any:
    """Over all but the site's plates, in which it is independent."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    if frames:
        return terms.sum_to(frames)
    return sum(value.sum() for value in terms.values())


_STOCK_SCORES = Distribution.score_parts


def _may_have_score(law: Any) -> bool:
    """Whether draws of ``law`` may carry less than the whole gradient."""
    if not law.has_rsample:
        return True
    return getattr(type(innermost_law(law)), "score_parts", _STOCK_SCORES) is not _STOCK_SCORES


def _closed_kl(q: Any, p: Any) -> Tensor | None:
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _total(value: Tensor, site: Any) -> Tensor:
    """The sum of a log-density or KL, scaled and masked as its site is."""
    scale, mask = site["scale"], site["mask"]
    if mask is None and not isinstance(scale, Tensor):
        total = value.sum() if value.dim() else value
        return total if scale == 1 else total * scale
    return scale_and_mask(value, scale, mask).sum()


def _site_kl(site: Any, guide_site: Any, mapped: bool = False) -> tuple[Tensor, list[_Cost]]:
    """A site's KL, and the terms that it is made of."""
    name = site["name"]
    # Where values are mapped from auxiliary draws, the Jacobian is the density of a point mass,
    # which the closed KL of a point mass leaves out.
    kl = None if mapped else _closed_kl(guide_site["fn"], site["fn"])
    if kl is not None:
        return _total(kl, guide_site), [_Cost(name, kl, guide_site, 1.0, closed=True)]
    log_q = guide_site["fn"].log_prob(guide_site["value"])
    log_p = site["fn"].log_prob(guide_site["value"])
    total = _total(log_q, guide_site) - _total(log_p, site)
    return total, [_Cost(name, log_q, guide_site, 1.0), _Cost(name, log_p, site, -1.0)]
