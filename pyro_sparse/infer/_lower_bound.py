"""The evidence lower bound as a number: of data that training has seen, or has not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta, ImproperUniform
from torch import Tensor

from pyro_sparse import nets
from pyro_sparse.distributions import NormalJeffreys
from pyro_sparse.distributions.kl import innermost_law
from pyro_sparse.graph import evaluating
from pyro_sparse.guides import GroupGuide
from pyro_sparse.inputs import as_rows
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters

from .elbo import ELBO

__all__ = ["LowerBound", "lower_bound", "without_evidence"]


class LowerBound(NamedTuple):
    """An estimate in nats, for all ``num_data`` examples.

    log_likelihood: expected under the guide
    kl:             from the prior, at weight 1
    choice:         what the choice of the weights or units that are left costs,
                    −log p(support); 0 where nothing was pruned, see
                    :meth:`pyro_sparse.models.support.Support.log_prior`
    error:          standard error of ``value`` by the draws, given the batches; NaN for one draw
    """

    log_likelihood: float
    kl: float
    choice: float = 0.0
    error: float = math.nan

    @property
    def value(self) -> float:
        """The bound; on the log evidence unless `without_evidence` has a reason why not."""
        return self.log_likelihood - self.kl - self.choice

    @property
    def given_support(self) -> float:
        """The bound of the pruned model itself, as if it had been chosen before the data came."""
        return self.log_likelihood - self.kl


def without_evidence(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> str | None:
    """Why no bound of this model and guide is one on a log evidence, or None where it is.

    An improper prior has no evidence, and its KL has an arbitrary constant. Point estimates are
    chosen by the data for free, so that what is left is the evidence of another model each time.

    Args:
        model, guide: Pyro callables with the same latent sites.
        args, kwargs: what both are called with.
    """
    with torch.no_grad(), own_parameters(model, guide):
        q = poutine.trace(guide).get_trace(*args, **kwargs)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*args, **kwargs)
    for name, site in p.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or name not in q.nodes:
            continue
        prior, law = innermost_law(site["fn"]), innermost_law(q.nodes[name]["fn"])
        if isinstance(law, Delta) and not isinstance(prior, Delta):
            # What is mapped from an auxiliary draw, as in Pyro's autoguides, differs in the next.
            with torch.no_grad(), torch.random.fork_rng([]), own_parameters(model, guide):
                again = poutine.trace(guide).get_trace(*args, **kwargs).nodes[name]
            first, second = q.nodes[name]["value"], again["value"]
            if first is not None and second is not None and torch.equal(first, second):
                return f"{name} is a point estimate"
        if isinstance(prior, NormalJeffreys | ImproperUniform):
            return f"the prior of {name} is improper"
    return None


def lower_bound(
    model: SparseModel,
    guide: GroupGuide,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    draws: int = 20,
    seed: int = 0,
) -> LowerBound:
    r"""Estimate :math:`\frac{N}{n} Σ_i E_q[\log p(y_i \mid x_i, θ)] - \text{KL}(q ‖ p)`.

    Of a pruned model, less what the choice of its support costs.

    N is the model's ``num_data`` and n the number of examples given: the training data themselves,
    or others that stand for them. Batch normalisations use the statistics of each batch and its
    draw, as in training; dropout and the like are in eval mode. The caller's random states are left
    as they were.

    Args:
        model, guide: see `fit`.
        loader: ``(x, y)`` batches, moved to where the model is.
        draws: of the guide, for each batch.
        seed: of the draws, and of the order of a loader that has a ``generator``, whose state is
            left as it was: the same noise for every state that is compared.

    Raises:
        ValueError: the loader gives no batch.
    """
    elbo = ELBO()
    log_likelihood = kl = variance = 0.0
    count = 0
    device = model.output_scale.device
    with (
        evaluating(model),
        evaluating(guide),
        nets.kept_statistics(model.net),
        torch.random.fork_rng(range(torch.cuda.device_count())),
        _seeded(loader, seed),
        own_parameters(model, guide),
    ):
        torch.manual_seed(seed)
        for layer in nets.normalisations(model.net):
            layer.train()
        for x, y in loader:
            x, y = as_rows(x).to(device), y.to(device)
            made = [elbo.estimate(model, guide, x, y) for _ in range(draws)]
            terms = torch.stack([torch.stack([one.log_likelihood, one.kl]) for one in made])
            terms = len(y) * terms.double().cpu()
            log_likelihood += float(terms[:, 0].mean())
            kl += float(terms[:, 1].mean())
            if draws > 1:
                variance += float((terms[:, 0] - terms[:, 1]).var()) / draws
            count += len(y)
    if not count:
        raise ValueError("expected at least one batch of (x, y), got none")
    error = math.sqrt(variance) / count if draws > 1 else math.nan
    return LowerBound(log_likelihood / count, kl / count, -model.support.log_prior(), error)


@contextlib.contextmanager
def _seeded(loader: Any, seed: int) -> Iterator[None]:
    """The loader's own generator, if it has one, at this seed; its state restored afterwards."""
    generator = getattr(loader, "generator", None)
    if not isinstance(generator, torch.Generator):
        yield
        return
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
