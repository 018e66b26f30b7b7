"""Loops of training and pruning: reduce, train on, and reduce again.

One reduction is exact for the posterior it starts from, but what is left then moves; hence
:func:`iterate`, the algorithm of Beckers et al. (arXiv 2210.09134): train, prune all that the rule
drops, train on without it, until a pass prunes nothing. :class:`PruneEvery` prunes in the midst
of one training instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_sparse.infer import (
    checkpoint_file,
    fit,
    lower_bound,
    read_json,
    restore,
    schedules,
    write_json,
)

from .network import FittedNetwork
from .reduction import delta_evidence
from .selection import ModelReduction, SelectionRule

__all__ = ["Pass", "PruneEvery", "free_energy", "iterate"]


@dataclass(frozen=True)
class Pass:
    """One pass of :func:`iterate`; free energies: see :func:`free_energy`.

    Attributes:
        number: 1 for the first; 0 for the state before any pruning.
        removed: weights or units that this pass took out.
        left: weights or units that are in after it.
        predicted: the free energy that model reduction predicts for the pruned model from the one
            before, F − ΣΔF; None for rules that are not about single Gaussian weights.
        pruned: the free energy right after pruning.
        free_energy: after training on.
        seconds: of training on.
    """

    number: int
    removed: int
    left: int
    predicted: float | None
    pruned: float
    free_energy: float
    seconds: float = 0.0


def free_energy(
    posterior: FittedNetwork,
    loader: Iterable[tuple[Tensor, Tensor]],
    draws: int = 20,
    seed: int = 0,
) -> float:
    """Negative evidence lower bound of all data given what is left, nats: lower is better.

    Its changes are what model reduction predicts. What the choice of the support costs is not in
    it, see :meth:`~pyro_sparse.models.support.Support.log_prior`.

    Args:
        posterior: model and guide.
        loader: ``(x, y)`` batches of the training data; batches of equal size count alike.
        draws, seed: see :func:`pyro_sparse.infer.lower_bound`.
    """
    bound = lower_bound(posterior.model, posterior.guide, loader, draws=draws, seed=seed)
    return -bound.given_support


def iterate(
    posterior: FittedNetwork,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    rule: SelectionRule | None = None,
    max_passes: int = 30,
    draws: int = 20,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> list[Pass]:
    """Prune by ``rule``, train on, and repeat until a pass prunes nothing.

    Args:
        posterior: model and guide, trained.
        loader: batches to train on.
        epochs: of training after each pass.
        rule: what is dropped; the model's default when absent. Of Gaussian weights it is
            :class:`~pyro_sparse.posterior.selection.ModelReduction`.
        max_passes: at most so many.
        draws: of the guide, to estimate each free energy.
        seed: of the noise.
        out: folder in which every pass gets a run folder, ``pass-1`` and so on, beside path.json.
        resume: go on with the passes in ``out``. The posterior must be as it was before the first.
        **options: further arguments of :func:`pyro_sparse.infer.fit`. Other than there the KL
            has its full weight throughout: what is left is trained already.

    Returns:
        The path: the state before, then one entry for each pass that pruned something. One more
        pass would prune nothing, unless ``max_passes`` came first.

    Raises:
        ValueError: as ``rule`` and `fit`.
    """
    if rule is None and posterior.gaussians():
        rule = ModelReduction()
    support = posterior.model.support
    options.setdefault("kl_weight", schedules.constant())
    fabric = options.get("fabric")

    def left() -> int:
        return sum(int(support[name].sum()) for name in support)

    folder = None if out is None else Path(out)
    resume = resume and folder is not None
    if resume and folder is not None and (folder / "path.json").is_file():
        path = [Pass(**one) for one in read_json(folder / "path.json")]
        done = checkpoint_file(folder / f"pass-{path[-1].number}")
        restore(done, posterior.model, posterior.guide, loader=loader)
    else:
        now = free_energy(posterior, loader, draws, seed)
        path = [Pass(0, 0, left(), None, now, now)]
    for number in range(len(path), max_passes + 1):
        now = path[-1].free_energy
        laws = posterior.gaussians()
        before = {name: support[name].clone() for name in support}
        removed = posterior.prune(rule)
        if not removed:
            break
        predicted = None
        if laws and all(law.covariance is None for law in laws.values()):
            gain = sum(
                float(
                    delta_evidence(law.loc, law.variance, law.prior_variance)[
                        before[name] & ~support[name]
                    ].sum()
                )
                for name, law in laws.items()
            )
            predicted = now - gain
        pruned = free_energy(posterior, loader, draws, seed)
        fitted = fit(
            posterior.model, posterior.guide, loader, epochs=epochs, seed=seed + number,
            out=folder and folder / f"pass-{number}", resume=resume, **options,
        )  # fmt: skip
        now = free_energy(posterior, loader, draws, seed)
        path.append(Pass(number, removed, left(), predicted, pruned, now, fitted.seconds))
        if folder is not None and (fabric is None or fabric.is_global_zero):
            entries = [dataclasses.asdict(one) for one in path]
            write_json(folder / "path.json", entries)
    return path


@dataclass
class PruneEvery:
    """Prune in the midst of training: pass it to ``fit`` as ``on_epoch``.

    ``fit(..., on_epoch=PruneEvery(posterior, rule, every=5))`` applies the rule after every fifth
    epoch; the epochs in between fine-tune what is left.

    Attributes:
        posterior: of the model and guide that are trained.
        rule: what is dropped.
        every: epochs between prunings.
        start: first epoch at which it prunes.
        stop: last epoch at which it prunes; the rest only trains.

    Raises:
        ValueError: ``every`` below 1.
    """

    posterior: FittedNetwork
    rule: SelectionRule
    every: int = 5
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"expected at least one epoch between prunings, got {self.every}")

    def __call__(self, metrics: dict[str, Any]) -> None:
        epoch = metrics["epoch"]
        due = epoch % self.every == 0 and epoch >= self.start
        if due and (self.stop is None or epoch <= self.stop):
            metrics["removed"] = self.posterior.prune(self.rule)
