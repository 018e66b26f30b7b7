"""One way to say that a name is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(kind: str, name: str, known: Iterable[str]) -> str:
    """An error message: the unknown name, the nearest known ones, and all of them.

    Args:
        kind: what the name names, such as "model".
        name: as it was given.
        known: all valid names.
    """
    known = list(known)
    by_lower = {option.lower(): option for option in known}
    close = [
        by_lower[m] for m in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    ]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}."
