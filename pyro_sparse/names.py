"""Names and words that several parts share, without torch; one way to say a name is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["AUTOGUIDES", "OPTIMIZERS", "PRECISIONS", "SCHEDULES", "UNDECIDED", "nearest"]

AUTOGUIDES = ("auto-normal", "auto-low-rank", "auto-delta")
"""Pyro's own guides, see `pyro_sparse.guides.Automatic`."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Of the network's forward pass in training; with ``mixed``, everything else is in float32."""
OPTIMIZERS = ("adam", "sgd")
"""See `pyro_sparse.infer`; ``sgd`` has momentum 0.9."""
SCHEDULES = ("constant", "cosine", "linear", "steps")
"""Of learning rates, see `pyro_sparse.infer.schedules`."""
UNDECIDED = (0.05, 0.95)
"""Inclusion probabilities between which a unit counts as undecided."""


def nearest(kind: str, name: str, known: Iterable[str]) -> str:
    """An error message: the unknown name, the nearest known ones, and all of them.

    Args:
        kind: what the name names, such as "model".
        name: as it was given.
        known: all valid names.
    """
    known = list(known)
    # What follows a colon is an argument: mpl:8 is near to mlp:400-400.
    by_head = {option.lower().partition(":")[0]: option for option in known}
    head = name.lower().partition(":")[0]
    close = [by_head[m] for m in difflib.get_close_matches(head, by_head, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}."
