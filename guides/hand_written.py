"""A guide that is any Pyro callable of the user's, asked like the others as far as it can say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.distributions.kl import base_law
from pyro_sparse.graph import Group
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import StoredParameters, own_parameters

from .base import GroupGuide
from .families import Read

__all__ = ["HandWritten"]


class HandWritten(GroupGuide):
    """A function or module with Pyro statements as the guide of a network's model.

    `fit` and `Posterior` make it from what they are given. Parameters in Pyro's store stay there:
    ``pyro.param`` gives what was trained, and what stock SVI trained before is what is gone on
    with. Those that inclusion logits are made of move at the rate of inclusions, all others at that
    of weights.

    Inclusion probabilities are those of its :class:`~pyro_sparse.distributions.SpikeAndSlab` sites
    ``{group}.rows`` and ``input.gate``. The network at posterior means has every site at the mean
    of its law (of its slab, where it has one).

    Args:
        model: the model to match.
        function: a Pyro callable with the model's latent sites. It is called without arguments: the
            weights of a network are no example's own.

    Raises:
        ValueError: it cannot be called without arguments, or has other sites, or other shapes, than
            the model; the message names them.
    """

    def __init__(self, model: SparseModel, function: Callable[..., Any]) -> None:
        super().__init__(model)
        # Neither is a submodule: the model is no part of its guide, and what the guide knows of
        # learnt scales and noise stands in sites of its own.
        self.__dict__["_model"] = (model,)
        self.prior_precisions = nn.ModuleDict()
        self.written = StoredParameters(function)
        try:
            trace = self.written.collect()
        except TypeError as error:
            raise ValueError(
                "expected a guide that can be called without arguments, as guide(x=None, y=None) "
                f"can: weights are no example's own; got {type(error).__name__}: {error}"
            ) from error
        _check_sites(model, trace)
        if self.noise_precision is not None:
            noise: Any = Read(lambda: self._laws()["noise_precision"])
            self.noise_precision = noise
        if self.inclusion_logits():
            self.keep_kl_weights()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.written()

    def layers(self) -> Iterator[tuple[Group, Any]]:
        """None: what it has of a group is known by running it."""
        return iter(())

    def _laws(self) -> dict[str, Any]:
        """Laws of the latent sites as they are now, by name, without plates and masks."""
        with torch.random.fork_rng([]), own_parameters(self), poutine.block():
            trace = poutine.trace(self.written).get_trace()
        return {
            name: base_law(site["fn"])
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
        }

    def parameters_by_kind(self) -> dict[str, list[nn.Parameter]]:
        """By what inclusion logits depend on; see `GroupGuide.parameters_by_kind`."""
        kinds: dict[str, list[nn.Parameter]] = {"weights": [], "inclusion": [], "scales": []}
        logits = [value.sum() for value in self.inclusion_logits().values() if value.requires_grad]
        own = [value for value in self.parameters() if value.requires_grad]
        found = torch.autograd.grad(logits, own, allow_unused=True) if logits else [None] * len(own)
        for value, gradient in zip(own, found, strict=True):
            kinds["weights" if gradient is None else "inclusion"].append(value)
        return kinds

    def inclusion_logits(self) -> dict[str, Tensor]:
        """Logits of the `SpikeAndSlab` sites of rows and of the input gate."""
        (model,) = self._model
        laws = self._laws()
        sites = {"input": "input.gate", **{g.name: f"{g.name}.rows" for g in model.layers}}
        return {
            group: laws[site].logits
            for group, site in sites.items()
            if isinstance(laws.get(site), SpikeAndSlab)
        }

    def mean_rows(self) -> dict[str, Tensor]:
        """The effective rows of included units with every site at its law's mean."""
        (model,) = self._model
        means = {}
        for name, law in self._laws().items():
            law = law.slab if isinstance(law, SpikeAndSlab) else law
            try:
                means[name] = law.mean.detach()
            except NotImplementedError:
                raise ValueError(
                    f"the network at posterior means needs the mean of the guide's site {name!r}, "
                    f"and a {type(law).__name__} does not have it"
                ) from None
        return model.rows_at(means)


def _check_sites(model: SparseModel, trace: Any) -> None:
    """Raise ``ValueError`` unless the guide has the model's latent sites, of their shapes."""
    with torch.random.fork_rng([]), torch.no_grad(), own_parameters(model):
        wanted = poutine.trace(model.statements).get_trace()

    def shapes(own: Any) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(site["value"].shape)
            for name, site in own.nodes.items()
            if site["type"] == "sample"
            and not site["infer"].get("is_auxiliary")
            and not poutine.util.site_is_subsample(site)
        }

    expected, found = shapes(wanted), shapes(trace)
    wrong = [
        f"{name} {found.get(name, 'missing')} (expected {expected.get(name, 'none')})"
        for name in (*expected, *(set(found) - set(expected)))
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise ValueError(
            f"the guide does not have the latent sites of {type(model).__name__}, or has others: "
            + "; ".join(wrong)
        )
