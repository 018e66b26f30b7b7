"""The evidence lower bound as a number: of data that training has seen, or has not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sparse import nets
from pyro_sparse.graph import evaluating
from pyro_sparse.guides import GroupGuide
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters

from .elbo import ELBO

__all__ = ["LowerBound", "lower_bound"]


class LowerBound(NamedTuple):
    """An estimate in nats, for all ``num_data`` examples.

    log_likelihood: expected under the guide
    kl:             from the prior, at weight 1
    """

    log_likelihood: float
    kl: float

    @property
    def value(self) -> float:
        return self.log_likelihood - self.kl


def lower_bound(
    model: SparseModel,
    guide: GroupGuide,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    draws: int = 20,
    seed: int = 0,
) -> LowerBound:
    r"""Estimate :math:`\frac{N}{n} Σ_i E_q[\log p(y_i \mid x_i, θ)] - \text{KL}(q ‖ p)`.

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
    elbo = ELBO(draws)
    log_likelihood = kl = 0.0
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
            estimate = elbo.estimate(model, guide, x.to(device), y.to(device))
            log_likelihood += float(estimate.log_likelihood) * len(y)
            kl += float(estimate.kl) * len(y)
            count += len(y)
    if not count:
        raise ValueError("expected at least one batch of (x, y), got none")
    return LowerBound(log_likelihood / count, kl / count)


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
