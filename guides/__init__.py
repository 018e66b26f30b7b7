"""Guides: the variational family that matches each model, under the same class and file name.

A guide has the model's sites in the model's order, families with closed-form KL, and starts from
the network's own weights. Parameters live in logs and logits and are plain ``nn.Parameter``s;
inclusions are named ``inclusion_logits``.

To add one, subclass :class:`GroupGuide`, write ``forward`` (the sample statements) and ``scales``
(the posterior mean of each unit's scale, if the model has scales), and register it::

    @guides.for_model.register
    def _(model: MyModel, **options):
        return MyGuide(model, **options)
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from pyro_sparse import models

from .base import GroupGuide, Reducible, SpikeSlabGuide
from .deterministic import Deterministic
from .families import LogNormalFamily
from .group_horseshoe import GroupHorseshoe
from .group_normal_jeffreys import GroupNormalJeffreys
from .log_normal_noise import LogNormalNoise
from .reducible_gaussian import ReducibleGaussian
from .spike_slab_gaussian import SpikeSlabGaussian
from .spike_slab_group_horseshoe import SpikeSlabGroupHorseshoe
from .spike_slab_group_lasso import SpikeSlabGroupLasso
from .turbo_markov import TurboMarkov

__all__ = [
    "Deterministic",
    "GroupGuide",
    "GroupHorseshoe",
    "GroupNormalJeffreys",
    "LogNormalFamily",
    "LogNormalNoise",
    "Reducible",
    "ReducibleGaussian",
    "SpikeSlabGaussian",
    "SpikeSlabGroupHorseshoe",
    "SpikeSlabGroupLasso",
    "SpikeSlabGuide",
    "TurboMarkov",
    "for_model",
]


@singledispatch
def for_model(model: Any, **options: Any) -> GroupGuide:
    """The guide that matches ``model``; ``options`` go to the guide's constructor.

    :raises TypeError: where no guide is registered for the model's class.
    """
    raise TypeError(
        f"no guide is registered for {type(model).__name__}; expected one of "
        f"{sorted(cls.__name__ for cls in for_model.registry if cls is not object)}, or a class "
        "for which you called guides.for_model.register"
    )


@for_model.register
def _(model: models.SpikeSlabGaussian, **options: Any) -> GroupGuide:
    return SpikeSlabGaussian(model, **options)


@for_model.register
def _(model: models.SpikeSlabGroupLasso, **options: Any) -> GroupGuide:
    return SpikeSlabGroupLasso(model, **options)


@for_model.register
def _(model: models.SpikeSlabGroupHorseshoe, **options: Any) -> GroupGuide:
    return SpikeSlabGroupHorseshoe(model, **options)


@for_model.register
def _(model: models.Deterministic, **options: Any) -> GroupGuide:
    return Deterministic(model, **options)


@for_model.register
def _(model: models.LogNormalNoise, **options: Any) -> GroupGuide:
    return LogNormalNoise(model, **options)


@for_model.register
def _(model: models.ReducibleGaussian, **options: Any) -> GroupGuide:
    return ReducibleGaussian(model, **options)


@for_model.register
def _(model: models.TurboMarkov, **options: Any) -> GroupGuide:
    return TurboMarkov(model, **options)


@for_model.register
def _(model: models.GroupNormalJeffreys, **options: Any) -> GroupGuide:
    return GroupNormalJeffreys(model, **options)


@for_model.register
def _(model: models.GroupHorseshoe, **options: Any) -> GroupGuide:
    return GroupHorseshoe(model, **options)
