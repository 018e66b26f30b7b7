"""`SitePosterior`: any Pyro model with any guide, asked by the names of its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_sparse.distributions import MarkovChain, SpikeAndSlab
from pyro_sparse.distributions.kl import base_law

from . import arviz
from .diagnostics import KHat, khat
from .draws import Draw, draw, exact_trace, measuring, scoring
from .fitted import Fitted

__all__ = ["SiteContraction", "SitePosterior"]


@dataclass(frozen=True)
class SiteContraction:
    """How far the data moved a latent site from its prior; an entry for each of its numbers.

    Attributes:
        contraction: 1 − Var_q / Var_p, moments over draws with excluded entries as zeros; below 0
            where the posterior is the wider one.
        shift: (E_q − E_p) / sd_p.
    """

    contraction: Tensor
    shift: Tensor


class SitePosterior(Fitted):
    """What the data say about a hand-written Pyro model, by its fitted guide.

    Neither needs to be one of this package's: functions will do, with parameters in Pyro's store or
    their own. What is known without a network is here; units, pruning, compact networks and exports
    need a :class:`~pyro_sparse.models.SparseModel` and :class:`~pyro_sparse.Posterior`.

    Args:
        model: a Pyro callable.
        guide: a Pyro callable with the same latent sites, after training.
        args, kwargs: what both are called with, all of the data.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, guide)
        self.args, self.kwargs = args, kwargs

    @scoring()
    def inclusion(self, num_samples: int = 100) -> dict[str, Tensor]:
        """Posterior inclusion probabilities by site, in the site's batch shape, float64.

        Of :class:`SpikeAndSlab` and :class:`MarkovChain` sites of the guide: the exact probability
        given the sites that come before, averaged over draws of those where it depends on them.

        Args:
            num_samples: draws; one is enough for a guide whose sites are independent.
        """
        found: dict[str, list[Tensor]] = {}
        with measuring(self.guide):
            for _ in range(num_samples):
                trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
                for name, site in trace.nodes.items():
                    law = base_law(site["fn"]) if site["type"] == "sample" else None
                    if isinstance(law, SpikeAndSlab):
                        found.setdefault(name, []).append(law.logits.double().sigmoid().cpu())
                    elif isinstance(law, MarkovChain):
                        found.setdefault(name, []).append(law.mean.double().cpu())
        return {name: torch.stack(values).mean(0) for name, values in found.items()}

    def draws(self, num_samples: int = 500) -> dict[str, Tensor]:
        """Draws of all latent sites, ``(num_samples, ...)`` by name."""
        return _stacked(self.joint_draws(num_samples, *self.args, **self.kwargs))

    def predictive(self, *args: Any, num_samples: int = 500, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of what the model observes, for other inputs or the same.

        Args:
            args, kwargs: what the model is called with, its targets left out so that it samples
                them; those of the posterior when absent, whose observed sites are drawn anew.
            num_samples: draws.

        Returns:
            ``(num_samples, ...)`` by site that the guide does not have.
        """
        given, options = (args, kwargs) if args or kwargs else (self.args, self.kwargs)
        draws: list[dict[str, Any]] = []
        with measuring(self.model, self.guide):
            for _ in range(num_samples):
                latent = exact_trace(self.guide, *self.args, **self.kwargs)
                own = {
                    name: latent.nodes[name]["value"]
                    for name in latent.stochastic_nodes
                    if not poutine.util.site_is_subsample(latent.nodes[name])
                }
                model = poutine.condition(poutine.uncondition(self.model), data=own)
                sites = draw(model, None, *given, **options).sites
                draws.append({name: value for name, value in sites.items() if name not in own})
        return {name: torch.stack([one[name] for one in draws]) for name in draws[0]}

    @scoring()
    def contraction(self, num_samples: int = 500) -> dict[str, SiteContraction]:
        """Prior and posterior moments of every latent site, by draws of both.

        Args:
            num_samples: draws of each.
        """
        posterior = self.draws(num_samples)
        prior = self._prior(num_samples)
        found = {}
        for name in posterior:
            q, p = (values[name].double() for values in (posterior, prior))
            spread = p.var(0)
            found[name] = SiteContraction(
                1 - q.var(0) / spread, (q.mean(0) - p.mean(0)) / spread.sqrt()
            )
        return found

    def _prior(self, num_samples: int) -> dict[str, Tensor]:
        with measuring(self.model):
            return _stacked(
                draw(self.model, None, *self.args, **self.kwargs) for _ in range(num_samples)
            )

    def khat(self, num_samples: int = 1000, **options: Any) -> KHat:
        """Pareto k-hat, joint and by site, see :func:`~pyro_sparse.posterior.diagnostics.khat`."""
        kwargs = {**self.kwargs, **options}
        return khat(self.model, self.guide, *self.args, num_samples=num_samples, **kwargs)

    def to_arviz(self, num_samples: int = 500, *, prior: bool = True) -> Any:
        """Draws of posterior, prior and posterior predictive: an InferenceData or a DataTree.

        Args:
            num_samples: draws of each.
            prior: whether the prior's are in, which needs proper ones.
        """
        groups: dict[str, dict[str, Any]] = {
            "posterior": self.draws(num_samples),
            "posterior_predictive": self.predictive(num_samples=num_samples),
        }
        if prior:
            groups["prior"] = self._prior(num_samples)
        arrays = {
            group: {name: value.numpy() for name, value in values.items()}
            for group, values in groups.items()
        }
        return arviz.build(arrays, {}, {})

    @scoring()
    def summary(self, num_samples: int = 500) -> Any:
        """A DataFrame with a line a number of each latent site: mean, deviation, 95 % interval.

        Where there are sites with inclusions, their probability is beside these.

        Args:
            num_samples: draws.
        """
        import pandas as pd

        inclusion = self.inclusion()
        lines = {}
        for name, values in self.draws(num_samples).items():
            low, high = values.double().quantile(torch.tensor([0.025, 0.975]).double(), 0)
            for index in np.ndindex(*values.shape[1:]):
                place: Any = (slice(None), *index)
                own = values[place].double()
                known = inclusion.get(name)
                label = f"{name}{list(index)}" if index else name
                lines[label] = {
                    "mean": float(own.mean()),
                    "std": float(own.std()),
                    "low": float(low[index]),
                    "high": float(high[index]),
                    "inclusion": None if known is None else float(known[index[: known.dim()]]),
                }
        frame = pd.DataFrame.from_dict(lines, orient="index")
        return frame if inclusion else frame.drop(columns="inclusion")


def _stacked(draws: Iterable[Draw]) -> dict[str, Tensor]:
    """The model's latent sites of several draws."""
    several = [
        {
            name: value.detach().cpu()
            for name, value in one.sites.items()
            if not one.prior.nodes[name]["is_observed"]
        }
        for one in draws
    ]
    return {name: torch.stack([one[name] for one in several]) for name in several[0]}
