"""Draws of a guide from its exact law, whatever relaxation it trained with."""

from __future__ import annotations

from typing import Any

from pyro.distributions import Independent, MaskedDistribution
from pyro.poutine.messenger import Messenger

from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab

__all__ = ["ExactDraws", "base_law", "exact_law"]


def base_law(law: Any) -> Any:
    """``law`` without its masks and reinterpreted dimensions."""
    while isinstance(law, Independent | MaskedDistribution):
        law = law.base_dist
    return law


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
