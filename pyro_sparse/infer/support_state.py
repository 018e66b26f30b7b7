r"""A Gaussian regression given its support, and what every other support next to it is worth.

With rows weighted by ω, a noise precision τ and normal slabs, whose precisions in units of τ are
the diagonal C, a support S has

.. math::
    K = G_{SS} + C_S, \quad G = X^T Ω X, \quad b = X^T Ω z, \qquad
    \log p(z \mid S) = \tfrac{τ}{2} b_S^T K^{-1} b_S - \tfrac12 \log\frac{|K|}{|C_S|} + \text{const}

and adding a unit j to it gains :math:`\frac{τ}{2} r^T D^{-1} r - \frac12 \log |D| / |C_j|` with the
Schur complement :math:`D = G_{jj} + C_j - G_{jS} K^{-1} G_{Sj}` and
:math:`r = b_j - G_{jS} K^{-1} b_S`. `SupportState` holds D and r of *all* units, so the conditional
inclusion probabilities of all p units cost O(p); a unit that enters or leaves changes them by
O(|S| p). This is the sweep operator, of which only the rows in S are kept.

A unit is one column, or a block of them. All blocks have the width of the widest: a column of zeros
changes no evidence, since its D is its C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit

__all__ = ["SupportState", "scan", "swap"]

SWAPS = 5
"""Swaps after a scan, at most; fewer where fewer units are in."""


class SupportState:
    """See the module.

    Args:
        x: columns, blocks one after the other.
            Shape: (n, units · width).
        width: columns of a unit.
        gram: ``x.T @ x`` where it is worth keeping; else its rows are computed when needed.
    """

    def __init__(self, x: np.ndarray, width: int, gram: np.ndarray | None = None) -> None:
        self.x, self.gram, self.width = x, gram, width
        blocks = x.reshape(len(x), -1, width)
        self.units = blocks.shape[1]
        self._own = np.einsum("nua,nub->uab", blocks, blocks)

    def refresh(
        self, moment: np.ndarray, precision: np.ndarray, tau: float, included: np.ndarray
    ) -> None:
        """Everything for the support ``included``, without what rounding left of steps before.

        Args:
            moment: b.
                Shape: (units · width,).
            precision: C, prior precisions of the coefficients over τ; 0 for a flat prior.
                Shape: (units, width).
            tau: precision of the noise.
            included: mask of S.
                Shape: (units,).
        """
        self.tau, self.included = tau, included.copy()
        members = np.flatnonzero(included)
        self._log_prior = np.log(np.where(precision > 0, precision, 1.0)).sum(1)
        columns, end = self.columns(members), len(moment)
        rows = self._rows(columns)
        inverse = np.linalg.inv(rows[:, columns] + np.diag(precision[members].ravel()))
        # One row for each coefficient in S: of K⁻¹ G_S, of K⁻¹ b_S and of K⁻¹, side by side, since
        # all three change alike; with room for more units.
        room = 2 * len(columns) + 16 * self.width
        self._table = np.zeros((room, end + 1 + room))
        self._members = np.zeros(room // self.width, dtype=int)
        self._members[: len(members)] = members
        self.size = len(members)
        inside = self._table[: len(columns)]
        inside[:, :end] = inverse @ rows
        inside[:, end] = inverse @ moment[columns]
        inside[:, end + 1 : end + 1 + len(columns)] = (inverse + inverse.T) / 2
        # G_jS K⁻¹ G_Sj: products of the two factors' blocks, summed over S.
        shape = (len(columns), self.units, self.width)
        explained = np.einsum("kua,kub->uab", rows.reshape(shape), inside[:, :end].reshape(shape))
        diagonal = precision[:, :, None] * np.eye(self.width)
        self.schur = self._own + diagonal - explained
        self.residual = (moment - inside[:, :end].T @ moment[columns]).reshape(-1, self.width)

    def columns(self, units: np.ndarray) -> np.ndarray:
        """Indices of the columns of some units."""
        return (units[:, None] * self.width + np.arange(self.width)).ravel()

    def _rows(self, columns: Any) -> np.ndarray:
        return self.gram[columns] if self.gram is not None else self.x[:, columns].T @ self.x

    @property
    def members(self) -> np.ndarray:
        """The units that are in, as `mean` has them."""
        return self._members[: self.size]

    @property
    def mean(self) -> np.ndarray:
        """Posterior mean of the coefficients in S."""
        return self._table[: self.size * self.width, self.x.shape[1]]

    @property
    def inverse(self) -> np.ndarray:
        """K⁻¹."""
        end, size = self.x.shape[1] + 1, self.size * self.width
        return self._table[:size, end : end + size]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One draw of all coefficients given S, 0 outside; shape ``(units · width,)``."""
        beta = np.zeros(self.x.shape[1])
        if self.size:
            factor = np.linalg.cholesky(self.inverse)
            noise = factor @ rng.standard_normal(len(factor)) / np.sqrt(self.tau)
            beta[self.columns(self.members)] = self.mean + noise
        return beta

    def gains(self) -> np.ndarray:
        """Log Bayes factor of each unit, given that all others stay as they are; ``(units,)``."""
        schur, residual = self.schur, self.residual
        if self.size:
            schur, residual = schur.copy(), residual.copy()
            schur[self.members], residual[self.members] = self._without(slice(None))
        if self.width == 1:
            d, explained = schur[:, 0, 0], residual[:, 0] ** 2 / schur[:, 0, 0]
            return 0.5 * (self.tau * explained - np.log(d) + self._log_prior)
        solved = np.linalg.solve(schur, residual[..., None])[..., 0]
        explained = (residual * solved).sum(1)
        log_size = np.linalg.slogdet(schur)[1]
        return 0.5 * (self.tau * explained - log_size + self._log_prior)

    def _without(self, places: Any) -> tuple[np.ndarray, np.ndarray]:
        """D and r of members, given all other members."""
        if self.width == 1:
            own = 1 / self.inverse.diagonal()[places]
            return own[:, None, None], (own * self.mean[places])[:, None]
        shape = (self.size, self.width, self.size, self.width)
        some = np.arange(self.size)[places]
        own = np.linalg.inv(self.inverse.reshape(shape)[some, :, some, :])
        mean = self.mean.reshape(-1, self.width)[some]
        return own, np.einsum("uab,ub->ua", own, mean)

    def flip(self, unit: int) -> None:
        """Put a unit in, or take it out."""
        (self._remove if self.included[unit] else self._add)(unit)
        self.included[unit] = not self.included[unit]

    def _add(self, unit: int) -> None:
        width, size = self.width, self.size * self.width
        if size == len(self._table):
            self._grow()
        own, end = slice(unit * width, (unit + 1) * width), self.x.shape[1]
        schur, residual = self.schur[unit].copy(), self.residual[unit].copy()
        inverse = 1 / schur if width == 1 else np.linalg.inv(schur)
        row, inside = self._rows(own), self._table[:size]
        old = inside[:, own].copy()
        new = np.zeros((width, self._table.shape[1]))
        new[:, :end] = inverse @ (row - row[:, self.columns(self.members)] @ inside[:, :end])
        new[:, end] = inverse @ residual
        new[:, end + 1 : end + 1 + size] = -inverse @ old.T
        new[:, end + 1 + size : end + 1 + size + width] = inverse
        inside -= old @ new
        self._table[size : size + width] = new
        self._members[self.size] = unit
        self.size += 1
        self._change(new[:, :end], schur, residual, -1)

    def _remove(self, unit: int) -> None:
        width, end = self.width, self.x.shape[1]
        place, last = int(np.flatnonzero(self.members == unit)[0]), self.size - 1
        out, back = (slice(one * width, (one + 1) * width) for one in (place, last))
        (schur,), (residual,) = self._without(slice(place, place + 1))
        new = self._table[out].copy()
        inside, inverse = self._table[: self.size * width], self._table[:, end + 1 :]
        inside -= (inverse[: self.size * width, out] @ schur) @ new
        # The last block takes the place that is empty now.
        inside[out], self._members[place] = inside[back], self._members[last]
        inverse[: self.size * width, out] = inverse[: self.size * width, back]
        inside[back], inverse[: self.size * width, back] = 0.0, 0.0
        self.size = last
        self._change(new[:, :end], schur, residual, 1)
        self.schur[unit], self.residual[unit] = schur, residual

    def _grow(self) -> None:
        """Room for twice as many units."""
        room = len(self._table)
        self._table = np.pad(self._table, ((0, room), (0, room)))
        self._members = np.pad(self._members, (0, len(self._members)))

    def _change(self, new: np.ndarray, schur: np.ndarray, residual: np.ndarray, sign: int) -> None:
        """D and r of all units outside, for a block whose rows of K⁻¹ G_S are ``new``."""
        if self.width == 1:
            self.schur[:, 0, 0] += sign * schur[0, 0] * new[0] ** 2
            self.residual[:, 0] += sign * residual[0] * new[0]
            return
        blocks = new.reshape(self.width, self.units, self.width)
        self.schur += sign * np.einsum("aui,ab,buj->uij", blocks, schur, blocks, optimize=True)
        self.residual += sign * np.einsum("aui,a->ui", blocks, residual)


def scan(
    state: SupportState,
    prior: Callable[[np.ndarray], np.ndarray],
    free: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """One collapsed Gibbs update of every free unit, in random order.

    While nothing flips, the conditionals of all units stay as they are; so a scan costs as many
    evaluations of all of them as there are flips, and one.

    Args:
        state: changed in place.
        prior: log prior odds of each unit given the others, from the mask of those that are in.
        free: units that are neither always in nor always out.
        rng: source of randomness.

    Returns:
        The conditional probability of each unit when its turn came, whose mean is the inclusion
        probability (the Rao-Blackwell estimate); those that are not free: 0 or 1.
    """
    order, probability = rng.permutation(free), state.included.astype(float)
    uniform = rng.random(len(order))
    bar = np.log(uniform) - np.log1p(-uniform)
    while len(order):
        odds = (prior(state.included) + state.gains())[order]
        probability[order] = expit(odds)
        flips = np.flatnonzero((odds > bar) != state.included[order])
        if not len(flips):
            break
        state.flip(order[flips[0]])
        order, bar = order[flips[0] + 1 :], bar[flips[0] + 1 :]
    return probability


def swap(
    state: SupportState,
    prior: Callable[[np.ndarray], np.ndarray],
    free: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Take out a unit at random, and put in one of those that are out, itself among them.

    A Gibbs update of where the unit is: all places have supports of one size, and the chosen one
    is drawn in proportion to their posterior probabilities. So a column changes places with its
    near-copies, which updates of one unit at a time hardly ever do.

    Args:
        state, prior, free, rng: as of `scan`.
    """
    inside = free[state.included[free]]
    if not len(inside):
        return
    state.flip(rng.choice(inside))
    places = free[~state.included[free]]
    odds = (prior(state.included) + state.gains())[places]
    # The largest of Gumbel-perturbed logits is a draw in proportion to their exponentials.
    state.flip(places[np.argmax(odds + rng.gumbel(size=len(places)))])
