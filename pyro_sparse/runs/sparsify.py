"""`sparsify`: from a trained network to one of a given cost, fine-tuned and calibrated."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse import export, guides, infer, likelihoods, models, nets
from pyro_sparse.graph import evaluating
from pyro_sparse.infer import schedules
from pyro_sparse.posterior import MACBudget, Posterior
from pyro_sparse.posterior.calibration import predictive_scores
from pyro_sparse.posterior.network import STATISTICS
from pyro_sparse.posterior.summary import cautions
from pyro_sparse.ranges import positive, whole

__all__ = ["Sparsified", "sparsify"]

Loader = Iterable[tuple[Tensor, Tensor]]

SEARCH = 1 / 3
"""Share of the epochs before units are taken out; the others fine-tune what is left."""
INCLUSION_LR = 30
"""Rate of the inclusion logits over that of the weights: they decide within `SEARCH`."""
DECIDED = 7.0
"""Inclusion logit of what is left: one draw in a thousand is without the unit."""
SCORED = 10_000
"""Most examples on which networks are scored."""
WORSE = 0.015
"""Accuracy that may be lost without a word."""


@dataclass(frozen=True)
class Sparsified:
    """What `sparsify` made.

    Attributes:
        net: the compact network, a plain module without Pyro.
        posterior: from which it was cut; its draws are the ensemble.
        temperature: of the ensemble's class probabilities, fitted on validation rows.
        scores: of ``trained`` (the network as it came), ``ensemble`` and ``compact``, see
            :func:`~pyro_sparse.posterior.calibration.predictive_scores`.
        macs: multiply-accumulate operations for one input, of ``trained`` and ``compact``.
        cautions: what has to be known before this is used, a sentence each; often nothing.
        scored_on: validation rows, or those of training.
    """

    net: nn.Module
    posterior: Posterior
    temperature: float
    scores: dict[str, dict[str, float]]
    macs: dict[str, int]
    cautions: tuple[str, ...]
    scored_on: str

    def predict(self, x: Tensor, num_samples: int = 20) -> Tensor:
        """The ensemble's class probabilities, calibrated, or its means: ``(N, ...)``.

        Args:
            x: inputs.
                Shape: (N, ...).
            num_samples: draws.
        """
        return self.posterior.predict(x, num_samples, temperature=self.temperature).mean(0)

    def save(self, directory: str | Path, **options: Any) -> Path:
        """Write the compact network, with scores and cautions on its card.

        Args:
            directory: made if missing.
            options: of :func:`pyro_sparse.export.save`.
        """
        metadata = {
            "model": type(self.posterior.model).__name__,
            "scores": self.scores,
            "scored_on": self.scored_on,
            "temperature": self.temperature,
            "cautions": list(self.cautions),
            **options.pop("metadata", {}),
        }
        return export.save(self.net, directory, metadata=metadata, **options)

    def __str__(self) -> str:
        share = self.macs["compact"] / self.macs["trained"]
        lines = [f"{self.macs['compact']:,} of {self.macs['trained']:,} MACs ({share:.0%})"]
        for name, scores in self.scores.items():
            shown = {
                key: scores[key] for key in ("accuracy", "rmse", "nll", "ece") if key in scores
            }
            lines.append(f"{name:9}" + "".join(f" {k} {v:.4f}" for k, v in shown.items()))
        return "\n".join([*lines, *self.cautions])


def sparsify(
    net: nn.Module,
    loader: Loader,
    *,
    budget: float = 0.5,
    epochs: int = 12,
    validation: tuple[Tensor, Tensor] | Loader | None = None,
    likelihood: likelihoods.Likelihood | None = None,
    lr: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Sparsified:
    r"""Cut a trained network down to a share of its cost.

    Recipe: the network's own weights are the locations of a spike-and-slab posterior (SS-IG), which
    trains on with the KL at the small weight of :func:`~pyro_sparse.infer.schedules.cheap`
    throughout, since accuracy is the question and not probabilities. In the first third of the
    epochs every unit's inclusion moves by what the unit does for the likelihood; then the units of
    highest inclusion are kept that the budget allows
    (:class:`~pyro_sparse.posterior.selection.MACBudget`), the others are taken out for good, and
    the rest of the epochs fine-tunes. The ensemble's temperature is fitted on validation rows.

    Args:
        net: the trained network, which is left as it is; any that
            :func:`pyro_sparse.graph.groups` can trace.
        loader: the pipeline that it was trained with: ``(x, y)`` batches, an epoch each time it is
            iterated.
        budget: the share of the network's multiply-accumulate operations (MACs) that may be left,
            in (0, 1).
        epochs: passes over the data, at least 2.
        validation: rows that training does not see, ``(x, y)`` or a loader of them, for scores,
            temperature and cautions; without, those of training are taken, which is said.
        likelihood: how outputs become targets; of classes for whole numbers and normal for others
            when None.
        lr: learning rate of the weights, at the beginning of either part.
        seed: of the noise.
        progress: show progress bars.
        options: of :func:`pyro_sparse.fit`.

    Returns:
        The compact network with everything that is known of it. Each of its cautions is a warning,
        too.

    Raises:
        ValueError: before any training: an option is out of range, the data do not fit the network,
            nothing of it can be pruned, or one unit a layer already costs more than the budget.
    """
    positive(budget=budget)
    if budget >= 1:
        raise ValueError(f"expected a budget below 1, the share of MACs that is left, got {budget}")
    whole(least=2, epochs=epochs)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        inputs, targets, size = _look(loader)
    if likelihood is None:
        numbers = targets.is_floating_point()
        likelihood = likelihoods.Normal() if numbers else likelihoods.Categorical()
    model = models.SpikeSlabGaussian(net, inputs[:2], likelihood=likelihood, num_data=size)
    posterior = Posterior(model, guides.for_model(model), inputs)
    dense = posterior.macs({})
    rule = MACBudget(budget * dense)
    posterior.keep(rule)  # refuses a budget that cannot be met
    held = (inputs, targets) if validation is None else _gathered(validation)
    x, y = (value[:SCORED] for value in held)
    infer.check_data(model, x, y, "validation data")
    with evaluating(net), torch.no_grad():
        trained = torch.cat([net(part) for part in x.split(256)])

    search = max(1, round(SEARCH * epochs))
    how: dict[str, Any] = {
        "lr": lr, "inclusion_lr": INCLUSION_LR * lr, "progress": progress,
        "kl_weight": lambda _: schedules.cheap(size), **options,
    }  # fmt: skip
    infer.fit(model, posterior.guide, loader, epochs=search, seed=seed, **how)
    found = posterior.summary(rule).groups
    posterior.prune(rule)
    _decide(posterior.guide)
    infer.fit(model, posterior.guide, loader, epochs=epochs - search, seed=seed + 1, **how)
    keep = posterior.keep(lambda _: {})  # all of what was not taken out
    posterior.refresh_statistics(keep)
    small = export.compact(posterior, keep)

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        classes = likelihood.class_probabilities(likelihood.natural(trained[:1])) is not None
        temperature = posterior.temperature(x, y) if classes else 1.0
        both = posterior.evaluate(x, y, keep=keep, temperature=temperature)
    latents = posterior.mean_latents()
    scores = {"trained": predictive_scores(likelihood, [(trained, latents)], y)}
    for name in ("ensemble", "compact"):
        scores[name] = {k.replace(f"_{name}", ""): v for k, v in both.items() if f"_{name}" in k}
    said = [*cautions(found, both), *_worse(scores)]
    if validation is None:
        said.append(
            "caution: scores and temperature are those of training rows, as there were no others; "
            "pass validation="
        )
    for caution in said:
        warnings.warn(caution, stacklevel=2)
    macs = {"trained": dense, "compact": nets.count_macs(small, inputs[:1])}
    on = "training rows" if validation is None else "validation rows"
    return Sparsified(small, posterior, temperature, scores, macs, tuple(said), on)


@torch.no_grad()
def _decide(guide: guides.GroupGuide) -> None:
    """The budget has decided: what is left is in, and no draw leaves it out any more."""
    for name, logits in guide.named_parameters():
        if name.endswith("inclusion_logits"):
            logits.fill_(DECIDED)


def _worse(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A caution where the compact network fell behind the one that came, beyond chance."""
    before, after = scores["trained"], scores["compact"]
    name = "accuracy" if "accuracy" in before else "rmse"
    lost = before[name] - after[name] if name == "accuracy" else after[name] - before[name]
    least = WORSE if name == "accuracy" else 0.1 * before[name]
    if lost <= max(least, 2 * after[f"{name}_error"]):
        return []
    return [
        f"caution: the compact network is worse than the trained one ({name} {after[name]:.3g} "
        f"against {before[name]:.3g}); train for more epochs, or leave it a larger budget"
    ]


def _look(loader: Loader) -> tuple[Tensor, Tensor, int]:
    """Some examples of a loader with their targets, and how many it has in all."""
    xs, ys, size = [], [], 0
    held: Any = getattr(loader, "x", getattr(loader, "dataset", None))
    known = len(held) if hasattr(held, "__len__") else None
    for batch in loader:
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ValueError(f"expected batches (x, y) from the loader, got {type(batch).__name__}")
        if not isinstance(batch[0], Tensor):
            raise ValueError(
                f"expected networks of one input, got batches of {type(batch[0]).__name__}; for "
                "several use pyro_sparse.fit and Posterior, which take them"
            )
        if size < STATISTICS:
            xs.append(batch[0])
            ys.append(batch[1])
        elif known is not None:
            break
        size += len(batch[1])
    if not xs:
        raise ValueError("the loader is empty; expected at least one batch of (x, y)")
    return torch.cat(xs), torch.cat(ys), known or size


def _gathered(validation: tuple[Tensor, Tensor] | Loader) -> tuple[Tensor, Tensor]:
    pair = tuple(validation) if isinstance(validation, tuple | list) else ()
    if len(pair) == 2 and all(isinstance(part, Tensor) for part in pair):
        return pair
    xs, ys = zip(*validation, strict=True)
    return torch.cat(xs), torch.cat(ys)
