"""Several guides of one hand-written Pyro model, trained alike and put side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim

from pyro_sparse.infer import ELBO, SVI, schedules
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import StoredParameters
from pyro_sparse.names import text_table
from pyro_sparse.ranges import positive, whole

from .diagnostics import KHat
from .sites import SitePosterior

__all__ = ["GuideComparison", "compare_guides"]


@dataclass(frozen=True)
class GuideComparison:
    """Fitted guides of one model; ``str()`` prints their bounds.

    All bounds are of the same log evidence, so the highest is the closest to it, and the difference
    between two guides' is the difference of their divergences KL(q ‖ posterior).

    Attributes:
        posteriors: by guide.
        khats: bounds and k-hat, by guide.
        losses: of every step, in nats, by guide.
        seconds: of training, by guide.
    """

    posteriors: dict[str, SitePosterior]
    khats: dict[str, KHat]
    losses: dict[str, list[float]]
    seconds: dict[str, float]

    def table(self) -> Any:
        """A DataFrame with a line a guide.

        Columns: ``elbo`` with its standard error by the draws, ``importance_weighted``: the bound
        with tenths of the draws, from which the ELBO is away by at most KL(q ‖ posterior) (both in
        nats), ``khat`` of the joint law, and ``seconds``. Bounds
        are NaN where the model has no evidence.
        """
        import pandas as pd

        lines = {}
        for name, found in self.khats.items():
            bounds = (found.elbo, found.elbo_error, found.importance_weighted_elbo)
            if found.without_evidence is not None:
                bounds = (math.nan,) * 3
            lines[name] = dict(
                zip(("elbo", "elbo_error", "importance_weighted"), bounds, strict=True),
                khat=found.joint,
                seconds=self.seconds[name],
            )
        return pd.DataFrame.from_dict(lines, orient="index")

    def marginals(self, num_samples: int = 500) -> Any:
        """A DataFrame with a line a number of each latent site, and columns by guide.

        Args:
            num_samples: draws of each guide.
        """
        import pandas as pd

        return pd.concat(
            {name: one.summary(num_samples) for name, one in self.posteriors.items()}, axis=1
        )

    def __str__(self) -> str:
        lines = [("guide", "ELBO", "importance-weighted", "k-hat", "seconds")]
        for name, row in self.table().iterrows():
            bound = f"{row['elbo']:.2f} ± {row['elbo_error']:.2f}"
            weighted = f"{row['importance_weighted']:.2f}"
            lines.append(
                (str(name), bound, weighted, f"{row['khat']:.2f}", f"{row['seconds']:.1f}")
            )
        return text_table(lines)


def compare_guides(
    model: Callable[..., Any],
    guides: Mapping[str, Callable[..., Any]],
    *args: Any,
    steps: int = 2000,
    lr: float = 0.02,
    num_particles: int = 1,
    num_samples: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> GuideComparison:
    """Train every guide of a Pyro model with the same steps of SVI, from the same seed.

    Adam with a rate that is held for 40 % of the steps and falls to 0 by a cosine, and
    :class:`~pyro_sparse.infer.ELBO`. Every guide has its parameters for itself, also where two give
    them the same names: Pyro's parameter store is left as it was. Random states are, too.

    Args:
        model: a Pyro callable without parameters to train.
        guides: Pyro callables (functions, modules, :mod:`pyro.infer.autoguide`) by name.
        args, kwargs: what model and guides are called with, all of the data.
        steps: of each.
        lr: learning rate.
        num_particles: draws of a guide a step.
        num_samples: draws for bounds and k-hat.
        seed: of the noise.

    Raises:
        ValueError: no guides, an option out of range, or a model of a network (use
            :func:`~pyro_sparse.compare`) or with parameters, which every guide would move.
        FloatingPointError: a guide's loss is no longer finite; it is named.
    """
    whole(steps=steps, num_particles=num_particles)
    positive(lr=lr)
    if isinstance(model, SparseModel):
        raise ValueError(
            "models of networks are compared by pyro_sparse.compare, with guide=...; this is for "
            "hand-written ones"
        )
    if not isinstance(guides, Mapping) or not guides:
        raise ValueError(f"expected guides by name, {{'mean field': guide}}, got {guides!r}")
    factor = schedules.cosine(hold=0.4)
    posteriors, khats, losses, seconds = {}, {}, {}, {}
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        for name, guide in guides.items():
            # A store of its own, which the wrapped guide goes on to have when it is over.
            with pyro.get_param_store().scope():
                torch.manual_seed(seed)
                own = StoredParameters(guide)
                own.collect(*args, **kwargs)
                given = StoredParameters(model)
                given.collect(*args, **kwargs)
                if list(given.parameters()):
                    raise ValueError(
                        "the model has parameters of its own "
                        f"({', '.join(name for name, _ in given.named_parameters())}), which every "
                        "guide would move: train one guide at a time, by pyro_sparse.infer.SVI"
                    )
                svi = SVI(model, own, PyroOptim(torch.optim.Adam, {"lr": lr}), ELBO(num_particles))
                started, found = time.perf_counter(), []
                for step in range(steps):
                    found.append(svi.step(*args, **kwargs))
                    if not math.isfinite(found[-1]):
                        raise FloatingPointError(
                            f"the loss of the guide {name!r} is {found[-1]} in step {step + 1}; "
                            "lower lr, or start its parameters elsewhere"
                        )
                    if svi.optimizer is not None:
                        svi.optimizer.param_groups[0]["lr"] = lr * factor((step + 1) / steps)
                seconds[name], losses[name] = time.perf_counter() - started, found
            posteriors[name] = SitePosterior(model, own, *args, **kwargs)
            khats[name] = posteriors[name].khat(num_samples, blocks={})
    return GuideComparison(posteriors, khats, losses, seconds)
