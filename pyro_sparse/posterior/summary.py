"""The summary table: a line a group."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.names import UNDECIDED, text_table

from .network import FittedNetwork, SelectionRule

__all__ = ["GroupSummary", "Summary", "summarise"]


@dataclass(frozen=True)
class GroupSummary:
    """One group.

    Attributes:
        group: its name.
        units: how many there are.
        kept: by the selection rule.
        expected: number of included units under q: Σ γ.
        low, high: central 95 % interval of that number under q (its exact law, Poisson-binomial).
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
        return text_table(lines)


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
        cumulative = _poisson_binomial(pip).cumsum(0)
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
    return Summary(tuple(groups))


def _poisson_binomial(probabilities: Tensor) -> Tensor:
    """Law of a sum of independent Bernoullis, ``(n + 1,)``, by convolution in float64."""
    law = torch.ones(1, dtype=torch.float64)
    for p in probabilities.tolist():
        law = torch.cat([law * (1 - p), law.new_zeros(1)]) + torch.cat([law.new_zeros(1), law * p])
    return law
