"""Loops of training and pruning: reduce, train on, and reduce again.

One reduction is exact for the posterior it starts from, but what is left then moves; hence
:func:`iterate`, the algorithm of Beckers et al. (arXiv 2210.09134): train, prune all that the rule
drops, train on without it, until a pass prunes nothing. :class:`PruneEvery` prunes in the midst
of one training instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_sparse import nets
from pyro_sparse.graph import evaluating
from pyro_sparse.infer import ELBO, fit, schedules
from pyro_sparse.modules import own_parameters

from .reduction import delta_evidence
from .selection import ModelReduction, SelectionRule

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["Pass", "PruneEvery", "free_energy", "iterate"]


@dataclass(frozen=True)
class Pass:
    """One pass of :func:`iterate`; free energies are negative ELBOs of all data, nats.

    Attributes:
        number: 1 for the first; 0 for the state before any pruning.
        removed: weights or units that this pass took out.
        left: weights or units that are in after it.
        predicted: the free energy that model reduction predicts for the pruned model from the one
            before, F − ΣΔF; None for rules that are not about single Gaussian weights.
        pruned: the free energy right after pruning.
        free_energy: after training on.
    """

    number: int
    removed: int
    left: int
    predicted: float | None
    pruned: float
    free_energy: float


@torch.no_grad()
def free_energy(
    posterior: Posterior, loader: Iterable[tuple[Tensor, Tensor]], draws: int = 20, seed: int = 0
) -> float:
    """Negative evidence lower bound of all data, nats: lower is better.

    Batch normalisations use the statistics of each batch and its draw, as in training; dropout and
    the like are in eval mode, as everywhere in `Posterior`.

    Args:
        posterior: model and guide.
        loader: ``(x, y)`` batches of the training data; batches of equal size count alike.
        draws: of the guide, for each batch.
        seed: of the draws, and of the order of a loader that has a ``generator``, whose state is
            left as it was: the same noise for every state that is compared.
    """
    model, guide = posterior.model, posterior.guide
    elbo = ELBO(draws)
    total, count = 0.0, 0
    device = model.output_scale.device
    with (
        evaluating(model),
        evaluating(guide),
        nets.kept_statistics(model.net),
        torch.random.fork_rng([]),
        _seeded(loader, seed),
        own_parameters(model, guide),
    ):
        torch.manual_seed(seed)
        for layer in nets.normalisations(model.net):
            layer.train()
        for x, y in loader:
            loss = elbo.estimate(model, guide, x.to(device), y.to(device)).loss
            total += float(loss) * len(y)
            count += len(y)
    return total / count


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


def iterate(
    posterior: Posterior,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    rule: SelectionRule | None = None,
    max_passes: int = 30,
    draws: int = 20,
    seed: int = 0,
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

    def left() -> int:
        return sum(int(support[name].sum()) for name in support)

    now = free_energy(posterior, loader, draws, seed)
    path = [Pass(0, 0, left(), None, now, now)]
    for number in range(1, max_passes + 1):
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
        fit(posterior.model, posterior.guide, loader, epochs=epochs, seed=seed + number, **options)
        now = free_energy(posterior, loader, draws, seed)
        path.append(Pass(number, removed, left(), predicted, pruned, now))
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

    posterior: Posterior
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
