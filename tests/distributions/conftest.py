"""The quadrature that closed forms are compared with."""

from collections.abc import Callable

import numpy as np
import pytest


@pytest.fixture(scope="session")
def integrate() -> Callable[..., float]:
    """Simpson's rule on 40,001 points, in extended precision: ``integrate(f, low, high)``."""
    weights = np.ones(40_001, dtype=np.longdouble)
    weights[1:-1:2], weights[2:-1:2] = 4, 2

    def rule(function: Callable, low: float, high: float) -> np.longdouble:
        x = np.linspace(np.longdouble(low), np.longdouble(high), len(weights), dtype=np.longdouble)
        return (weights * function(x)).sum() * (x[1] - x[0]) / 3

    return rule
