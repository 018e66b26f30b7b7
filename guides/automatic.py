"""Pyro's own guides, to compare with: any of `AUTOGUIDES` on a model with continuous latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch import Tensor
from torch.distributions import biject_to

from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.distributions.kl import innermost_law
from pyro_sparse.graph import Group
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters
from pyro_sparse.names import AUTOGUIDES

from .base import GroupGuide
from .families import Read

__all__ = ["Automatic"]

CLASSES: dict[str, Callable[..., AutoGuide]] = dict(
    zip(AUTOGUIDES, (AutoNormal, AutoLowRankMultivariateNormal, AutoDelta), strict=True)
)


class Automatic(GroupGuide):
    r"""One of :mod:`pyro.infer.autoguide` as the guide of a model, trained and asked like others.

    Latents are mapped to real numbers, where the guide is Gaussian (``"auto-normal"``: independent,
    ``"auto-low-rank"``: covariance :math:`D + W W^\top`) or a point (``"auto-delta"``: maximum a
    posteriori). It starts at the means of the model's own guide. No KL is closed and no layer's
    output is sampled instead of its weights, so gradients are noisier than those of the hand-made
    guides; that is what there is to compare. It has no inclusion probabilities and nothing else to
    select units by; the network at posterior means is the one at the medians of the latents.

    Args:
        model: the model to match.
        name: one of `AUTOGUIDES`.
        start: the model's own guide, before training.
        initial_scale: initial standard deviation in the real space.

    Raises:
        ValueError: the name is not known, or a latent is discrete, as inclusions are.
    """

    def __init__(
        self, model: SparseModel, name: str, start: GroupGuide, initial_scale: float = 0.01
    ) -> None:
        super().__init__(model)
        if name not in AUTOGUIDES:
            raise ValueError(f"expected a guide among {', '.join(AUTOGUIDES)}, got {name!r}")
        # Not a submodule: the model is no part of its guide.
        self.__dict__["_model"] = (model,)
        with torch.random.fork_rng([]), own_parameters(model, start):
            trace = poutine.trace(start).get_trace()
        laws: dict[str, Any] = {
            name: site["fn"] for name, site in trace.nodes.items() if site["type"] == "sample"
        }
        _check_continuous(model, laws)
        means = {name: law.mean.detach() for name, law in laws.items()}
        options: dict[str, Any] = {} if name == "auto-delta" else {"init_scale": initial_scale}
        init = init_to_value(values=means)
        with pyro.settings.context(module_local_params=True), torch.random.fork_rng([]):
            self.auto = CLASSES[name](self._latents, init_loc_fn=init, **options)
            self.auto()  # makes the parameters
        if self.noise_precision is not None:
            median: Any = Read(lambda: dist.Delta(self._medians()["noise_precision"]))
            self.noise_precision = median

    def _latents(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The model's latents without its data plate, which would be the guide's as well."""
        (model,) = self._model
        rows, *_ = model.statements()
        return rows

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.auto()

    def _medians(self) -> dict[str, Tensor]:
        with pyro.settings.context(module_local_params=True):
            return {name: value.detach() for name, value in self.auto.median().items()}

    def layers(self) -> Iterator[tuple[Group, Any]]:
        """None: the latents are not in families of their own."""
        return iter(())

    def mean_rows(self) -> dict[str, Tensor]:
        """The effective rows at the posterior medians of all latents."""
        (model,) = self._model
        return model.rows_at(self._medians())


def _check_continuous(model: SparseModel, laws: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where a latent's law has no bijection to real numbers."""
    for name, law in laws.items():
        base = innermost_law(law)
        try:
            if isinstance(base, SpikeAndSlab):
                raise NotImplementedError
            if not isinstance(base, dist.Delta):
                biject_to(law.support)
        except NotImplementedError:
            raise ValueError(
                f"the site {name!r} of {type(model).__name__} is a {type(base).__name__}, with "
                "no bijection to real numbers: Pyro's autoguides are for models whose latents are "
                "all continuous, as bmr, bc-gnj, bc-ghs and dense"
            ) from None
