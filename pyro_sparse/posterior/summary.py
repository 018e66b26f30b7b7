"""The summary table: a line a group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.names import UNDECIDED, text_table

from .network import FittedNetwork, SelectionRule

__all__ = ["GroupSummary", "Objective", "Summary", "cautions", "summarise"]


@dataclass(frozen=True)
class Objective:
    """What inclusion probabilities belong to; ``str()`` says it in one line.

    Attributes:
        kl_weight: of the KL when the inclusion logits came to rest; NaN where it is not known.
        lowest_kl_weight: the smallest at which they moved: a logit that saturated while the KL was
            cheap may never have come back.
        estimator: of the logits' gradient, see
            :func:`~pyro_sparse.guides.families.spike_and_slab`.
        chain: whether those of the inputs are a chain's over supports.
        seeds: runs that were merged.
        apart: largest difference between the chain's probabilities and the guide's own. Over
            designs whose exact probabilities are known it ranks as the guide's error does
            (docs/planted.md): where it is large, the network that is kept, which is the guide's,
            has other inputs than the probabilities say.
    """

    kl_weight: float
    lowest_kl_weight: float
    estimator: str | None
    chain: bool = False
    seeds: int = 1
    apart: float = 0.0

    @property
    def settled(self) -> bool:
        """Whether the logits moved at the evidence lower bound itself only, as far as is known."""
        return not (self.kl_weight != 1 or self.lowest_kl_weight < 1)

    def __str__(self) -> str:
        if math.isnan(self.kl_weight):
            text = "inclusion probabilities: the weight of the KL in training is not known"
        elif self.settled:
            text = "inclusion probabilities: of the evidence lower bound"
        elif self.kl_weight == 1:
            text = (
                "inclusion probabilities: decided from a KL weight of "
                f"{self.lowest_kl_weight:.2g} on, not those of the evidence lower bound alone"
            )
        else:
            text = (
                f"inclusion probabilities: at a KL weight of {self.kl_weight:.2g}, "
                "not those of the evidence lower bound"
            )
        text += f"; {self.estimator}" if self.estimator else ""
        text += f", {self.seeds} seeds" if self.seeds > 1 else ", one seed"
        if self.chain:
            text += (
                "; of inputs by a chain over supports, from which the guide's own are at most "
                f"{self.apart:.2f} away"
            )
        return text


@dataclass(frozen=True)
class GroupSummary:
    """One group.

    Attributes:
        group: its name.
        units: how many there are.
        kept: by the selection rule.
        expected: number of included units: the sum of their probabilities.
        low, high: central 95 % interval of that number: under q its exact law, Poisson-binomial, of
            inputs that of the chain over supports where there is one.
        undecided: units with 0.05 < γ < 0.95 (:data:`pyro_sparse.names.UNDECIDED`).
        entropy: of the inclusions, nats: Σ H(γ).

    What needs inclusion probabilities is None where the posterior has none.
    """

    group: str
    units: int
    kept: int
    expected: float | None = None
    low: int | None = None
    high: int | None = None
    undecided: int | None = None
    entropy: float | None = None


@dataclass(frozen=True)
class Summary:
    """A table of groups; ``str()`` prints it, ``rows`` are plain dicts for a DataFrame."""

    groups: tuple[GroupSummary, ...]
    objective: Objective | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [asdict(group) for group in self.groups]

    def __str__(self) -> str:
        header = ("group", "units", "kept", "expected (95 %)", "undecided", "entropy")
        lines = [header] + [
            (
                g.group,
                str(g.units),
                str(g.kept),
                "–" if g.expected is None else f"{g.expected:.1f} ({g.low}–{g.high})",
                "–" if g.undecided is None else str(g.undecided),
                "–" if g.entropy is None else f"{g.entropy:.2f}",
            )
            for g in self.groups
        ]
        more = [] if self.objective is None else [str(self.objective)]
        return "\n".join([text_table(lines), *more, *cautions(self.groups)])


MUCH_WORSE = 0.02
"""Accuracy by which a compact network may fall behind the ensemble without a word."""


def cautions(
    groups: Sequence[GroupSummary], scores: Mapping[str, float] | None = None
) -> list[str]:
    """What somebody who ships the compact network has to know, a sentence each; often nothing.

    Args:
        groups: of a `Summary`.
        scores: of `Posterior.evaluate`: a compact network that is worse than the ensemble by more
            than three standard errors (and `MUCH_WORSE`, or a fifth of the RMSE) is named.
    """
    said = []
    hidden = [group for group in groups if group.group != "input" and group.undecided is not None]
    units, undecided = (sum(getattr(g, n) or 0 for g in hidden) for n in ("units", "undecided"))
    if 2 * undecided > units:
        said.append(
            f"caution: {undecided} of {units} units are undecided, so which of them are kept is "
            "close to chance; train for more epochs, or with a larger inclusion_lr"
        )
    elif groups and all(group.kept == group.units for group in groups):
        said.append(
            "caution: nothing was pruned; train for more epochs, lower inclusion_probability, or "
            "keep by a budget (MACBudget)"
        )
    found = scores or {}
    for name, sign, least in (
        ("accuracy", 1.0, MUCH_WORSE),
        ("rmse", -1.0, 0.2 * found.get("rmse_ensemble", 0.0)),
    ):
        if f"{name}_compact" not in found:
            continue
        ensemble, compact = found[f"{name}_ensemble"], found[f"{name}_compact"]
        error = found.get(f"{name}_compact_error", 0.0)
        if sign * (ensemble - compact) > max(least, 3 * error):
            said.append(
                f"caution: the compact network is far worse than the ensemble ({name} "
                f"{compact:.3g} against {ensemble:.3g}): train until units are decided, keep more "
                "of them, or fine-tune what is left"
            )
    return said


def summarise(posterior: FittedNetwork, rule: SelectionRule | None = None) -> Summary:
    """See :meth:`Posterior.summary <pyro_sparse.posterior.Posterior.summary>`."""
    keep, inclusion = posterior.keep(rule), posterior.inclusion()
    groups = []
    for group in posterior.prunable_groups():
        name = group.name
        pip = inclusion.get(name)
        counts: dict[str, Any] = {
            "group": name,
            "units": group.size,
            "kept": int(keep[name].sum()),
        }
        if pip is None:
            groups.append(GroupSummary(**counts))
            continue
        chain = posterior.guide.chain() if name == "input" else None
        if chain is not None:
            draws = chain[1].sum(1).cpu()
            law = torch.bincount(draws, minlength=len(pip) + 1).double() / len(draws)
        else:
            law = _poisson_binomial(pip)
        cumulative = law.cumsum(0)
        entropy = torch.special.entr(pip) + torch.special.entr(1 - pip)
        groups.append(
            GroupSummary(
                **counts,
                expected=float(pip.sum()),
                low=int((cumulative < 0.025).sum()),
                high=int((cumulative < 0.975).sum()),
                undecided=int(((pip > UNDECIDED[0]) & (pip < UNDECIDED[1])).sum()),
                entropy=float(entropy.sum()),
            )
        )
    return Summary(tuple(groups), objective(posterior) if inclusion else None)


def objective(posterior: FittedNetwork) -> Objective:
    """What the inclusion probabilities belong to."""
    guide = posterior.guide
    weights = getattr(guide, "inclusion_kl_weights", None)
    lowest, last = (math.nan, math.nan) if weights is None else weights.tolist()
    chain, apart = guide.chain(), 0.0
    if chain is not None:
        own = posterior.guide_inclusion()["input"]
        apart = float((chain[0].double().cpu() - own).abs().max())
    return Objective(
        last, lowest, getattr(guide, "inclusion", None), chain is not None, apart=apart
    )


def _poisson_binomial(probabilities: Tensor) -> Tensor:
    """Law of a sum of independent Bernoullis, ``(n + 1,)``, by convolution in float64."""
    law = torch.ones(1, dtype=torch.float64)
    for p in probabilities.tolist():
        law = torch.cat([law * (1 - p), law.new_zeros(1)]) + torch.cat([law.new_zeros(1), law * p])
    return law
