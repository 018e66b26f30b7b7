"""Numbers that must lie in a range, refused by name before any work."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["finite", "positive", "whole"]


def finite(**values: Any) -> None:
    """Raise ``ValueError`` unless every named value is a finite number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"expected a finite {name}, got {value}")


def positive(**values: Any) -> None:
    """Raise ``ValueError`` unless every named value is a positive, finite number."""
    for name, value in values.items():
        if isinstance(value, str | list | tuple | None) or not 0 < value < math.inf:
            raise ValueError(f"expected a positive, finite {name}, got {value!r}")


def whole(least: int = 1, **values: Any) -> None:
    """Raise ``ValueError`` unless every named value is a whole number of at least ``least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"expected {name} to be a whole number of at least {least}, got {value!r}"
            )
