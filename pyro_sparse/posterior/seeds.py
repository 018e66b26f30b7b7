"""One model from several seeds: independent guides, and what they say together.

A guide of a network finds one of many optima. `fit_seeds` fits several; what they agree about is
known, and what they differ in shows how far one run can be believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.guides import GroupGuide
from pyro_sparse.infer import Run, fit
from pyro_sparse.models import SparseModel

from .calibration import predictive_scores
from .inclusion import MergedInclusion, merge
from .posterior import Posterior

__all__ = ["SeedEnsemble", "fit_seeds"]


@dataclass(frozen=True)
class SeedEnsemble:
    """Posteriors of one model from several seeds; predictions are of their equal mixture.

    Attributes:
        posteriors: one a seed; at least one.
        runs: what `fit` returned for each, by `fit_seeds`.
    """

    posteriors: Sequence[Posterior]
    runs: Sequence[Run] = field(default=())

    @cached_property
    def inclusion(self) -> MergedInclusion:
        """Inclusion probabilities with their spread over seeds, units matched, see `merge`."""
        return merge(self.posteriors)

    def draws(self, x: Tensor, num_samples: int = 20) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Draws as of `Posterior.draws`, ``num_samples`` of every seed, one after another."""
        return chain.from_iterable(one.draws(x, num_samples) for one in self.posteriors)

    def predict(self, x: Tensor, num_samples: int = 20) -> Tensor:
        """Draws of the likelihood's natural output, ``(seeds · num_samples, N, ...)``."""
        return torch.cat([one.predict(x, num_samples) for one in self.posteriors])

    def evaluate(
        self, x: Tensor, y: Tensor, num_samples: int = 20, target_scale: float = 1.0
    ) -> dict[str, float]:
        """Scores of the mixture: ``nll``, and ``accuracy`` and ``ece``, or ``rmse``.

        Args:
            x: inputs.
                Shape: (N, ...).
            y: targets.
                Shape: (N,).
            num_samples: draws of every seed.
            target_scale: standard deviation that the targets were divided by.
        """
        likelihood = self.posteriors[0].model.likelihood
        return predictive_scores(likelihood, self.draws(x, num_samples), y, target_scale)


def fit_seeds(
    make: Callable[[], tuple[SparseModel, GroupGuide]],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    seeds: int = 3,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> SeedEnsemble:
    """Fit independent guides with the seeds ``seed``, ``seed + 1``, ...

    Args:
        make: makes the network, the model and its guide; called once a seed, with torch's generator
            seeded, so that initial weights are independent, too.
        loader: see `fit`; its own order goes on from seed to seed.
        seeds: how many.
        seed: the first; the caller's random state is left as it was.
        out: the runs' folders are ``out/seed-0``, ``out/seed-1``, ...
        **options: see `fit`.

    Raises:
        ValueError: fewer than one seed, and as `fit`.
    """
    if seeds < 1:
        raise ValueError(f"expected at least one seed, got {seeds}")
    posteriors, runs = [], []
    for own in range(seed, seed + seeds):
        with torch.random.fork_rng([]):
            torch.manual_seed(own)
            model, guide = make()
        folder = None if out is None else Path(out) / f"seed-{own}"
        runs.append(fit(model, guide, loader, seed=own, out=folder, **options))
        posteriors.append(Posterior(model, guide, getattr(loader, "x", None)))
    return SeedEnsemble(posteriors, runs)
