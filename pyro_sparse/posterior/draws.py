"""Joint draws of a guide and its model, from exact laws whatever relaxation the guide trained with.

A draw runs the guide, then the model's statements with the guide's values (:func:`draw`); without a
guide it is one of the prior. What a draw gives, :class:`Draw` has by name: predictions, inclusions,
contraction, records and ensembles all start from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab
from pyro_sparse.distributions.kl import base_law
from pyro_sparse.graph import evaluating
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters
from pyro_sparse.threads import ALONE

__all__ = [
    "Draw",
    "ExactDraws",
    "Included",
    "draw",
    "exact_law",
    "exact_trace",
    "log_density",
    "measuring",
]


def exact_law(law: Any) -> Any:
    """``law`` with hard inclusions in place of relaxed ones; its density is the same."""
    if isinstance(law, Independent):
        return exact_law(law.base_dist).to_event(law.reinterpreted_batch_ndims)
    if isinstance(law, MaskedDistribution):
        return exact_law(law.base_dist).mask(law._mask)
    if isinstance(law, RelaxedSpikeAndSlab):
        return SpikeAndSlab(logits=law.logits, slab=law.slab)
    return law


class ExactDraws(Messenger):
    """Handler under which relaxed inclusions are drawn from their exact law."""

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(base_law(msg["fn"]), RelaxedSpikeAndSlab):
            msg["fn"] = exact_law(msg["fn"])


class Included(Messenger):
    """Handler under which spike-and-slab sites draw from their slabs: every unit is in.

    Attributes:
        probabilities: that units are in, float64, by site; noted on the way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        law = base_law(msg["fn"])
        if isinstance(law, SpikeAndSlab):
            self.probabilities[msg["name"]] = law.logits.detach().double().sigmoid().cpu()
            slab: Any = law.slab
            msg["fn"] = slab.to_event(len(slab.batch_shape))


@contextmanager
def scoring() -> Iterator[None]:
    """A score draws from where torch's random state is, and leaves it there."""
    with ALONE, torch.random.fork_rng(range(torch.cuda.device_count())):
        yield


@contextmanager
def measuring(*functions: Any) -> Iterator[None]:
    """No gradient, no validation, own parameters, networks in eval mode."""
    with ExitStack() as stack:
        stack.enter_context(own_parameters(*functions))
        stack.enter_context(torch.no_grad())
        stack.enter_context(pyro.validation_enabled(False))
        for function in functions:
            if isinstance(function, SparseModel):
                stack.enter_context(evaluating(function.net))
        yield


@dataclass(frozen=True)
class Draw:
    """One joint draw.

    Attributes:
        value: what the model's statements returned.
        prior: trace of these, at the drawn values.
        guide: trace of the guide; None for a draw of the prior.
    """

    value: Any
    prior: Any
    guide: Any = None

    @property
    def sites(self) -> dict[str, Tensor]:
        """Values of all of the model's sample statements."""
        return {
            name: site["value"]
            for name, site in self.prior.nodes.items()
            if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
        }

    @property
    def log_p(self) -> float:
        """Log density of the model at the draw, observations included."""
        return log_density(self.prior)

    @property
    def log_q(self) -> float:
        """Log density of the guide; 0 for a draw of the prior."""
        return 0.0 if self.guide is None else log_density(self.guide)


def draw(
    statements: Callable[..., Any],
    guide: Callable[..., Any] | None,
    *args: Any,
    handler: Messenger | None = None,
    **kwargs: Any,
) -> Draw:
    """A draw of the guide with the model's statements replayed by it.

    Args:
        statements: the model, or a part of it.
        guide: a Pyro callable with the same latent sites; None draws from the prior.
        args, kwargs: what both are called with.
        handler: how relaxed or excluded units are drawn; exactly (`ExactDraws`) when absent.
    """
    handler = handler or ExactDraws()
    if guide is None:
        with poutine.trace() as tracer, handler:
            value = statements(*args, **kwargs)
        return Draw(value, tracer.trace)
    with handler:
        own = poutine.trace(guide).get_trace(*args, **kwargs)
    with poutine.trace() as tracer, poutine.replay(trace=own):
        value = statements(*args, **kwargs)
    return Draw(value, tracer.trace, own)


def exact_trace(guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The trace of a guide alone, with hard inclusions."""
    with ExactDraws():
        return poutine.trace(guide).get_trace(*args, **kwargs)


def log_density(trace: Any, sites: Collection[str] | None = None) -> float:
    """Sum of the log densities of a trace's sites, in float64.

    Thousands of weights would cost float32 its last digits.

    Args:
        trace: of a model or guide.
        sites: those to count; all when absent.
    """
    total = 0.0
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or poutine.util.site_is_subsample(site):
            continue
        if sites is None or name in sites:
            log_prob = site["fn"].log_prob(site["value"]).double()
            total += float(scale_and_mask(log_prob, site["scale"], site["mask"]).sum())
    return total
