"""Draws of Pólya-Gamma laws against their closed moments and Laplace transform."""

import numpy as np
import pytest

from pyro_sparse.infer.polya_gamma import polya_gamma

DRAWS = 40_000


@pytest.mark.parametrize("tilt", [0.0, 0.3, -1.0, 3.0, 12.0, 60.0])
def test_moments_and_laplace_transform(tilt):
    draws = polya_gamma(np.full(DRAWS, tilt), np.random.default_rng(1))
    c = abs(tilt)
    mean = np.tanh(c / 2) / (2 * c) if c else 0.25
    # (sinh c - c) / cosh²(c/2), without its overflow
    variance = (2 * np.tanh(c / 2) - c / np.cosh(c / 2) ** 2) / (4 * c**3) if c else 1 / 24
    assert draws.min() > 0
    assert abs(draws.mean() - mean) < 5 * (variance / DRAWS) ** 0.5
    assert draws.var() == pytest.approx(variance, rel=0.06)
    rate = 1 / mean
    exact = np.cosh(c / 2) / np.cosh(np.sqrt(c**2 / 4 + rate / 2))
    values = np.exp(-rate * draws)
    assert abs(values.mean() - exact) < 5 * values.std() / DRAWS**0.5


def test_each_draw_has_its_own_tilt():
    tilt = np.tile([[0.0, 30.0]], (2000, 1))
    draws = polya_gamma(tilt, np.random.default_rng(0))
    assert draws.shape == tilt.shape
    assert draws.mean(0) == pytest.approx([0.25, 1 / 60], rel=0.05)
