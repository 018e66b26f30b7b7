"""Chains of spike-and-slab regressions: what is drawn, and by which updates.

Normal likelihoods are updated unit by unit with the coefficients integrated out; Bernoulli ones as
normal ones given their Pólya-Gamma weights; Poisson ones by Metropolis-Hastings. Each chain is an
endless iterator of `Draw`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular
from scipy.special import betaln, logsumexp

from pyro_sparse.likelihoods import Likelihood, Normal

from .polya_gamma import polya_gamma
from .support_state import SWAPS, SupportState, scan, swap

__all__ = [
    "Draw",
    "Prior",
    "Problem",
    "logistic_chain",
    "noise_prior",
    "normal_chain",
    "poisson_chain",
    "start",
]

KEPT_GRAM = 4096
"""Columns whose Gram matrix is kept (128 MB); of more, its rows are made when needed."""


class Prior(NamedTuple):
    """Of the inclusions: log-odds of each unit, or a Beta law of one probability for all.

    logits: ``(units,)``; ±∞ for units that are always in or never
    beta:   its two numbers, and then logits are 0 for all units that are free
    """

    logits: np.ndarray
    beta: tuple[float, float] | None

    @property
    def free(self) -> np.ndarray:
        return np.flatnonzero(np.isfinite(self.logits))

    def odds(self, included: np.ndarray) -> np.ndarray:
        """Log prior odds of each unit given all others; of units that are out: of one more."""
        if self.beta is None:
            return self.logits
        free = np.isfinite(self.logits)
        others = (included & free).sum() - (included & free)
        first, second = self.beta
        return self.logits + np.log(first + others) - np.log(second + free.sum() - 1 - others)

    def log_prob(self, included: np.ndarray) -> np.ndarray:
        """Of supports ``(..., units)``."""
        free = self.free
        inside = included[..., free]
        if self.beta is None:
            logits = self.logits[free]
            return -np.logaddexp(0, np.where(inside, -logits, logits)).sum(-1)
        first, second = self.beta
        size = inside.sum(-1)
        law = betaln(first + size, second + len(free) - size)
        return law - betaln(first, second)


class Problem(NamedTuple):
    """What was asked, as arrays; units are blocks of columns of one width.

    x:         ``(n, units · width)``, zeros where a block has fewer columns
    y:         ``(n,)``
    precision: 1 / σ0² by coefficient, ``(units, width)``; 0 for the intercept, which comes last
    places:    of the given columns among those of x, ``(columns,)``
    """

    x: np.ndarray
    y: np.ndarray
    precision: np.ndarray
    places: np.ndarray
    prior: Prior
    names: tuple[str, ...]
    columns: tuple[str, ...]
    intercept: bool


class Draw(NamedTuple):
    """One state of a chain: conditional probabilities, support, all coefficients, noise scale."""

    probability: np.ndarray
    included: np.ndarray
    beta: np.ndarray
    noise_scale: float


def noise_prior(likelihood: Likelihood) -> tuple[float | None, float, float]:
    """Noise precision where it is known, else None and the two numbers of its Gamma prior."""
    assert isinstance(likelihood, Normal)
    known = likelihood.noise_scale
    fixed = None if known is None else float(known) ** -2
    return fixed, float(likelihood.shape), float(likelihood.rate)


def start(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """A support at random: of the free units about five, or half of them if that is less."""
    free = problem.prior.free
    included = problem.prior.logits == math.inf
    included[free] = rng.random(len(free)) < min(0.5, 5 / max(len(free), 1))
    return included


def _update(state: SupportState, prior: Prior, rng: np.random.Generator) -> np.ndarray:
    """A scan, and as many swaps as units are in, at most `SWAPS`; probabilities of the scan."""
    probability = scan(state, prior.odds, prior.free, rng)
    for _ in range(min(SWAPS, int(state.included[prior.free].sum()))):
        swap(state, prior.odds, prior.free, rng)
    return probability


def normal_chain(
    problem: Problem, likelihood: Likelihood, included: np.ndarray, rng: np.random.Generator
) -> Iterator[Draw]:
    """Collapsed Gibbs updates, then the coefficients, then an unknown noise precision."""
    known, shape, rate = noise_prior(likelihood)
    x, y = problem.x, problem.y
    moment = x.T @ y
    gram = x.T @ x if x.shape[1] <= KEPT_GRAM else None
    state = SupportState(x, problem.precision.shape[1], gram)
    spread = 0.5 * float(np.var(y)) * len(y)
    tau = (shape + len(y) / 2) / (rate + spread) if known is None else known
    while True:
        state.refresh(moment, problem.precision / tau, tau, included)
        probability = _update(state, problem.prior, rng)
        included, beta = state.included, state.draw(rng)
        if known is None:
            inside = np.flatnonzero(beta)
            left = y - x[:, inside] @ beta[inside]
            tau = rng.gamma(shape + len(y) / 2) / (rate + left @ left / 2)
        yield Draw(probability, included.copy(), beta, tau**-0.5)


def logistic_chain(
    problem: Problem, likelihood: Likelihood, included: np.ndarray, rng: np.random.Generator
) -> Iterator[Draw]:
    """Pólya-Gamma weights given the linear predictor; given those, as a normal regression."""
    x, precision = problem.x, problem.precision
    moment = x.T @ (problem.y - 0.5)
    eta = np.zeros(len(x))
    while True:
        root = np.sqrt(polya_gamma(eta, rng))
        state = SupportState(x * root[:, None], precision.shape[1])
        state.refresh(moment, precision, 1.0, included)
        probability = _update(state, problem.prior, rng)
        included, beta = state.included, state.draw(rng)
        inside = np.flatnonzero(beta)
        eta = x[:, inside] @ beta[inside]
        yield Draw(probability, included, beta, math.nan)


FLIPS = 4
"""Proposals of a Poisson regression a draw, each followed by one of other coefficients."""
LIKE = 10.0
"""Degrees of freedom of the proposals of coefficients, whose tails are to be the heavier ones."""


class _Local:
    """The Gaussian approximation of a Poisson regression at its mode, given the support."""

    def __init__(self, problem: Problem, included: np.ndarray) -> None:
        x, y, precision = problem.x, problem.y, problem.precision
        width = precision.shape[1]
        columns = (np.flatnonzero(included)[:, None] * width + np.arange(width)).ravel()
        inside, own = x[:, columns], precision.ravel()[columns]

        def log_joint(beta: np.ndarray) -> float:
            eta = inside @ beta
            return float(y @ eta - np.exp(eta).sum() - 0.5 * own @ beta**2)

        # Newton's method on a concave function, with steps halved where they are too long.
        beta, value = np.zeros(len(columns)), -math.inf
        if problem.intercept:
            beta[-width] = math.log(y.mean())
        for _ in range(100):
            mean = np.exp(inside @ beta)
            slope = inside.T @ (y - mean) - own * beta
            step = np.linalg.solve((inside.T * mean) @ inside + np.diag(own), slope)
            if slope @ step < 1e-12:
                break
            value, length = log_joint(beta), 1.0
            with np.errstate(over="ignore"):
                while not log_joint(beta + length * step) >= value and length > 1e-9:
                    length /= 2
            beta = beta + length * step
        eta = inside @ beta
        mean = np.exp(eta)
        self.state = SupportState(x * np.sqrt(mean)[:, None], width)
        self.state.refresh(x.T @ (mean * eta + y - mean), precision, 1.0, included)
        # Copies: whoever leaves the state and comes back is its last member.
        self.mean, self.factor = self.state.mean.copy(), np.linalg.cholesky(self.state.inverse)
        free, self.included, self.columns = problem.prior.free, included, columns
        self.odds = (problem.prior.odds(included) + self.state.gains())[free]
        # A unit is flipped in proportion to the root of what that is worth: proposals there and
        # back are then about equally probable.
        worth = 0.5 * np.where(included[free], -self.odds, self.odds)
        self.log_flip = worth - logsumexp(worth)
        self._y, self._inside, self._own = y, inside, own
        self.log_prior = float(problem.prior.log_prob(included))
        self.log_prior += 0.5 * float(np.log(own[own > 0] / (2 * math.pi)).sum())

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        noise = rng.standard_normal(len(self.factor)) * math.sqrt(LIKE / rng.chisquare(LIKE))
        return self.mean + self.factor @ noise

    def weight(self, beta: np.ndarray) -> float:
        """Log of the joint density of support, coefficients and data over that of `draw`."""
        size, eta = len(beta), self._inside @ beta
        with np.errstate(over="ignore"):
            log_joint = self._y @ eta - np.exp(eta).sum() - 0.5 * self._own @ beta**2
        noise = solve_triangular(self.factor, beta - self.mean, lower=True)
        log_q = math.lgamma((LIKE + size) / 2) - math.lgamma(LIKE / 2)
        log_q -= 0.5 * size * math.log(LIKE * math.pi) + np.log(self.factor.diagonal()).sum()
        log_q -= 0.5 * (LIKE + size) * math.log1p(noise @ noise / LIKE)
        return float(self.log_prior + log_joint - log_q)

    def log_places(self, prior: Prior, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """Where ``unit`` may go, itself included, and log probabilities in the approximation."""
        self.state.flip(unit)
        places = prior.free[~self.state.included[prior.free]]
        odds = (prior.odds(self.state.included) + self.state.gains())[places]
        self.state.flip(unit)
        return places, odds - logsumexp(odds)


def poisson_chain(
    problem: Problem, likelihood: Likelihood, included: np.ndarray, rng: np.random.Generator
) -> Iterator[Draw]:
    """Metropolis-Hastings on supports and coefficients together.

    A Poisson likelihood becomes Gaussian by no exact augmentation. So a support is proposed by the
    Gaussian approximation at the mode of the present one, coefficients by a multivariate t around
    the mode of the proposed one, and both are accepted or not: exact for any approximation, and
    quick where it is a good one. Its `Draw.probability` is 0 or 1.

    Source: Zanella (JASA 115, 2020) for proposals in proportion to a root.
    """
    prior, free = problem.prior, problem.prior.free

    @lru_cache(maxsize=16)
    def local(mask: bytes) -> _Local:
        return _Local(problem, np.frombuffer(mask, dtype=bool).copy())

    here = local(included.tobytes())
    beta = here.draw(rng)

    def consider(there: _Local, log_ratio: float) -> None:
        nonlocal here, beta
        proposed = there.draw(rng)
        log_ratio += there.weight(proposed) - here.weight(beta)
        if math.log(rng.random()) < log_ratio:
            here, beta = there, proposed

    def moved(*units: int) -> _Local:
        mask = here.included.copy()
        mask[list(units)] = ~mask[list(units)]
        return local(mask.tobytes())

    while True:
        for _ in range(FLIPS if len(free) else 0):
            place = rng.choice(len(free), p=np.exp(here.log_flip))
            there = moved(free[place])
            consider(there, there.log_flip[place] - here.log_flip[place])
            consider(here, 0.0)
            inside = free[here.included[free]]
            if len(inside):
                unit = rng.choice(inside)
                places, forward = here.log_places(prior, unit)
                chosen = np.argmax(forward + rng.gumbel(size=len(places)))
                if places[chosen] != unit:
                    there = moved(unit, places[chosen])
                    back, backward = there.log_places(prior, places[chosen])
                    consider(there, backward[back == unit][0] - forward[chosen])
        consider(here, 0.0)
        everything = np.zeros(problem.x.shape[1])
        everything[here.columns] = beta
        yield Draw(here.included.astype(float), here.included, everything, math.nan)
