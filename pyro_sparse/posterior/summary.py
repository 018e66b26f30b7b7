"""The summary table: a line a group."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["GroupSummary", "Summary"]


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
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
