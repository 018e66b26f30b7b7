"""Names and words that several parts share, without torch: one error for names, one text table."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence

__all__ = [
    "AUTOGUIDES",
    "OPTIMIZERS",
    "PRECISIONS",
    "SCHEDULES",
    "UNDECIDED",
    "nearest",
    "text_table",
]

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
    head = str(name).lower().partition(":")[0]
    close = [by_head[m] for m in difflib.get_close_matches(head, by_head, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}."


def text_table(lines: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Lines of cells below one another, two spaces between columns.

    Args:
        lines: the header and the rest, all of one length.
        left: columns of words, which stand to the left; numbers stand to the right.
    """
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
