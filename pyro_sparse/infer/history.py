"""What training leaves: the metrics of every epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Run"]


@dataclass
class Run:
    """What `fit` returns: the metrics of every epoch, and where they lie.

    Attributes:
        history: one dict an epoch: ``epoch``, ``loss`` (nats per example, KL weighted as trained),
            ``elbo_per_datum``, ``log_likelihood_per_datum``, ``kl`` (nats), ``kl_weight``, ``lr``,
            ``seconds``, and ``kept``, ``expected``, ``undecided``: units by group; with validation
            data ``validation_elbo_per_datum``; and ``retries``, where there were any.
        out: the run folder, or None.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    out: Path | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training."""
        return sum(entry["seconds"] for entry in self.history)

    @property
    def best(self) -> dict[str, Any]:
        """The epoch with the largest evidence lower bound at full weight of the KL.

        That of the validation data if there are any, otherwise that of the training data, averaged
        over the epoch.
        """

        def bound(entry: dict[str, Any]) -> float:
            value = entry.get("validation_elbo_per_datum", entry["elbo_per_datum"])
            return value if math.isfinite(value) else -math.inf

        return max(self.history, key=bound)
