r"""Exact draws of Pólya-Gamma variables, which make a logistic regression Gaussian.

With :math:`ω_i ∼ PG(1, η_i)` the logistic likelihood of :math:`y_i ∈ \{0, 1\}` given ω is that of a
normal :math:`(y_i - ½) / ω_i` with mean :math:`η_i` and variance :math:`1 / ω_i`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import log_ndtr

__all__ = ["polya_gamma"]

CUT = 0.64
"""Where the two series of the density meet; any value is exact, this one rejects least."""


def polya_gamma(tilt: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""One draw of :math:`PG(1, c)` for each c.

    .. math::
        E = \frac{\tanh(c/2)}{2c}, \qquad
        \text{Var} = \frac{\sinh c - c}{4 c^3 \cosh^2(c/2)}

    A draw is a quarter of one of the tilted Jacobi law with :math:`z = |c|/2`. That is proposed
    from its density's first term, an exponential beyond `CUT` and an inverse Gaussian before it,
    and accepted by the alternating series, at least 99.9 % of the time.

    Args:
        tilt: c, any finite number.
            Shape: any.
        rng: source of randomness.

    Source: Polson, Scott, Windle (JASA 108, 2013), Section 4 and Algorithm 1; Devroye (Statistics
    & Probability Letters 79, 2009).
    """
    z = np.abs(np.asarray(tilt, dtype=np.float64)).ravel() / 2
    rate = math.pi**2 / 8 + z**2 / 2
    log_right = math.log(math.pi / 2) - np.log(rate) - rate * CUT
    root = math.sqrt(1 / CUT)
    log_left = math.log(2) + np.logaddexp(
        log_ndtr(root * (CUT * z - 1)) - z, log_ndtr(-root * (CUT * z + 1)) + z
    )
    right = np.exp(log_right - np.logaddexp(log_right, log_left))

    def propose(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        beyond = rng.random(len(which)) < right[which]
        value = CUT + rng.standard_exponential(len(which)) / rate[which]
        value[~beyond] = _inverse_gaussian(z[which[~beyond]], rng)
        return value, _accepted(value, rng)

    return (_until_accepted(len(z), propose) / 4).reshape(np.shape(tilt))


def _until_accepted(
    count: int, propose: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Rejection sampling of many at a time: ``propose(indices)`` gives values and acceptances."""
    out, open_ = np.empty(count), np.arange(count)
    while len(open_):
        value, accepted = propose(open_)
        out[open_[accepted]] = value[accepted]
        open_ = open_[~accepted]
    return out


def _accepted(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whether ``U a_0(x)`` lies below the alternating series of the density, term by term."""
    first = _coefficient(0, value)
    bar, partial = rng.random(len(value)) * first, first
    accepted, open_, n = np.zeros(len(value), dtype=bool), np.ones(len(value), dtype=bool), 0
    while open_.any():
        n += 1
        if n % 2:
            partial = partial - _coefficient(n, value)
            accepted |= open_ & (bar <= partial)
            open_ &= bar > partial
        else:
            partial = partial + _coefficient(n, value)
            open_ &= bar <= partial
    return accepted


def _coefficient(n: int, x: np.ndarray) -> np.ndarray:
    half = n + 0.5
    small = np.minimum(x, CUT)  # without overflow where the other branch is taken
    left = math.pi * half * (2 / (math.pi * small)) ** 1.5 * np.exp(-2 * half**2 / small)
    right = math.pi * half * np.exp(-(half**2) * math.pi**2 * x / 2)
    return np.where(x <= CUT, left, right)


def _inverse_gaussian(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Inverse Gaussians of mean 1/z and shape 1, given that they are at most `CUT`."""

    def propose(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = z[which]
        value, accepted = np.empty(len(own)), np.empty(len(own), dtype=bool)
        wide = own < 1 / CUT
        # A mean beyond the cut: tails of a normal, tilted.
        one, two = rng.standard_exponential((2, int(wide.sum())))
        value[wide] = CUT / (1 + CUT * one) ** 2
        tilt = np.exp(-0.5 * own[wide] ** 2 * value[wide])
        accepted[wide] = (one**2 <= 2 * two / CUT) & (rng.random(len(one)) < tilt)
        value[~wide] = rng.wald(1 / own[~wide], 1.0)
        accepted[~wide] = value[~wide] <= CUT
        return value, accepted

    return _until_accepted(len(z), propose)
