"""Guides: the variational family that matches each model, under the same class and file name.

A guide has the model's sites in the model's order, families with closed-form KL, and starts from
the network's own weights. Parameters live in logs and logits and are plain ``nn.Parameter``s;
inclusions are named ``inclusion_logits``.

To add one, subclass :class:`GroupGuide`, write ``forward`` (the sample statements) and ``scales``
(the posterior mean of each unit's scale, if the model has scales), what it says of units beyond
inclusions in ``offers`` (:class:`Offer`), and register it::

    @guides.for_model.register
    def _(model: MyModel, **options):
        return MyGuide(model, **options)
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from pyro_sparse import models

from .automatic import Automatic
from .base import GroupGuide, Reducible, SpikeSlabGuide
from .deterministic import Deterministic
from .families import LogNormalFamily
from .group_horseshoe import GroupHorseshoe
from .group_normal_jeffreys import GroupNormalJeffreys
from .hand_written import HandWritten
from .log_normal_noise import LogNormalNoise
from .offer import Offer
from .reducible_gaussian import ReducibleGaussian
from .spike_slab_gaussian import SpikeSlabGaussian
from .spike_slab_group_horseshoe import SpikeSlabGroupHorseshoe
from .spike_slab_group_lasso import SpikeSlabGroupLasso
from .turbo_markov import TurboMarkov

__all__ = [
    "Automatic",
    "Deterministic",
    "GroupGuide",
    "GroupHorseshoe",
    "GroupNormalJeffreys",
    "HandWritten",
    "LogNormalFamily",
    "LogNormalNoise",
    "Offer",
    "Reducible",
    "ReducibleGaussian",
    "SpikeSlabGaussian",
    "SpikeSlabGroupHorseshoe",
    "SpikeSlabGroupLasso",
    "SpikeSlabGuide",
    "TurboMarkov",
    "as_guide",
    "for_model",
]


@singledispatch
def for_model(model: Any, **options: Any) -> GroupGuide:
    """The guide that matches ``model``; ``options`` go to the guide's constructor.

    Raises:
        TypeError: where no guide is registered for the model's class.
    """
    raise TypeError(
        f"no guide is registered for {type(model).__name__}; expected one of "
        f"{sorted(cls.__name__ for cls in for_model.registry if cls is not object)}, or a class "
        "for which you called guides.for_model.register"
    )


# A guide has its model's name, and is made from the model and its own options.
for _guide in (
    SpikeSlabGaussian,
    SpikeSlabGroupLasso,
    SpikeSlabGroupHorseshoe,
    Deterministic,
    LogNormalNoise,
    ReducibleGaussian,
    TurboMarkov,
    GroupNormalJeffreys,
    GroupHorseshoe,
):
    for_model.register(getattr(models, _guide.__name__), _guide)


def as_guide(model: Any, guide: Any) -> GroupGuide:
    """A guide of this package as it is; any other Pyro callable as a `HandWritten` one.

    Args:
        model: of a network.
        guide: of it.

    Raises:
        ValueError: the model is none of a network, or the guide cannot be one of it.
    """
    if not isinstance(model, models.SparseModel):
        raise ValueError(
            f"expected a model of a network (pyro_sparse.models), got {type(model).__name__}; a "
            "hand-written Pyro model is trained by pyro_sparse.infer.SVI and asked by "
            "pyro_sparse.posterior.SitePosterior"
        )
    if isinstance(guide, GroupGuide):
        return guide
    if not callable(guide) or isinstance(guide, type):
        raise ValueError(f"expected a guide, a Pyro callable, got {guide!r}")
    return HandWritten(model, guide)
