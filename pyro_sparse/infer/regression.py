r"""Spike-and-slab regressions without a network: exact enumeration, and a sampler.

.. math::
    z_j ∼ \text{Bernoulli}(λ_j), \qquad β_j \mid z_j = 1 ∼ N(0, σ_0²), \quad β_j \mid z_j = 0 = 0,
    \qquad y_i ∼ p(y \mid α + x_i^T β)

with a flat prior of the intercept α. `enumerate_supports` is exact where there are few columns, and
`gibbs` where there are many: coefficients are integrated out, so that it moves among supports.
Question and answer are those of variable selection; a guide's inclusion probabilities can be held
against either.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import logit, logsumexp
from torch import Tensor

from pyro_sparse.likelihoods import Bernoulli, Likelihood, Normal, Poisson
from pyro_sparse.ranges import whole

from .chains import (
    Prior,
    Problem,
    logistic_chain,
    noise_prior,
    normal_chain,
    poisson_chain,
    start,
)

__all__ = ["Enumeration", "SupportDraws", "enumerate_supports", "gibbs"]

MOST_ENUMERATED = 20
"""Free units that are enumerated: a million supports."""


# -- the problem -----------------------------------------------------------------------------------


def _array(value: Any, what: str, dims: int) -> np.ndarray:
    array = _numbers(value)
    if array.ndim != dims:
        raise ValueError(f"expected {what} with {dims} axes, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{what} has {int((~np.isfinite(array)).sum())} values that are not finite"
        )
    return array


def _problem(
    x: Any,
    y: Any,
    likelihood: Likelihood,
    inclusion: Any,
    slab_scale: Any,
    groups: Sequence[Any] | None,
    intercept: bool,
) -> Problem:
    columns = tuple(str(name) for name in getattr(x, "columns", ()))
    x, y = _array(x, "x", 2), _array(y, "y", 1)
    if len(x) != len(y) or not len(y):
        raise ValueError(f"expected a target for every row of x, got {len(y)} for {len(x)} rows")
    likelihood.check(torch.zeros(len(y), dtype=torch.float64), torch.as_tensor(y))
    columns = columns or tuple(f"x{j}" for j in range(x.shape[1]))
    labels = [str(label) for label in (columns if groups is None else groups)]
    if len(labels) != x.shape[1]:
        raise ValueError(f"expected a group for each of {x.shape[1]} columns, got {len(labels)}")
    if groups is None and len(set(labels)) < len(labels):
        raise ValueError("two columns of x have one name; give each its own")
    names = tuple(dict.fromkeys(labels))
    unit = np.array([names.index(label) for label in labels])
    within = np.array([labels[:j].count(label) for j, label in enumerate(labels)])
    width, units = int(within.max()) + 1, len(names) + intercept
    places = unit * width + within
    blocks = np.zeros((len(x), units * width))
    blocks[:, places] = x
    scale = _numbers(slab_scale)
    if scale.shape not in ((), (x.shape[1],)):
        raise ValueError(
            f"expected one slab_scale or one for each of {x.shape[1]} columns, got shape "
            f"{scale.shape}"
        )
    scale = np.broadcast_to(scale, (x.shape[1],))
    if not ((scale > 0) & np.isfinite(scale)).all():
        raise ValueError(f"expected a positive slab_scale, got {slab_scale}")
    precision = np.ones(units * width)
    precision[places] = scale**-2.0
    if intercept:
        blocks[:, -width] = 1.0
        precision[-width] = 0.0
    prior = _prior(inclusion, len(names), intercept)
    return Problem(
        blocks, y, precision.reshape(units, width), places, prior, names, columns, intercept
    )


def _numbers(value: Any) -> np.ndarray:
    """A writable copy in float64."""
    value = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    return np.array(value, dtype=np.float64)


def _prior(inclusion: Any, units: int, intercept: bool) -> Prior:
    always = [math.inf] * intercept
    if isinstance(inclusion, torch.distributions.Beta):
        first, second = float(inclusion.concentration1), float(inclusion.concentration0)
        return Prior(np.array([0.0] * units + always), (first, second))
    probability = _numbers(inclusion)
    if probability.shape not in ((), (units,)):
        raise ValueError(
            f"expected one prior inclusion probability or one for each of {units} units, got shape "
            f"{probability.shape}"
        )
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError(f"expected inclusion probabilities in [0, 1], got {inclusion}")
    return Prior(np.append(logit(np.broadcast_to(probability, (units,))), always), None)


# -- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Enumeration:
    """The exact posterior over all supports.

    Attributes:
        names: of the units.
        columns: names of the coefficients.
        supports: which units are in.
            Shape: (supports, units).
        probabilities: posterior probability of each support.
            Shape: (supports,).
        inclusion: posterior inclusion probability.
            Shape: (units,).
        mean, std: of the coefficients, zeros of excluded ones among their values.
            Shape: (columns,).
        log_evidence: log p(y); relative to a flat prior of density 1 where there is an intercept.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    supports: Tensor
    probabilities: Tensor
    inclusion: Tensor
    mean: Tensor
    std: Tensor
    log_evidence: float

    def table(self) -> Any:
        """A DataFrame with a line a unit, the most probable first."""
        return _table({"inclusion": self.inclusion}, self.names)

    def co_inclusion(self, names: Sequence[str] | None = None) -> Any:
        """A DataFrame of P(both are in), for some units or all."""
        inside = self.supports.to(self.probabilities.dtype)
        both = inside.T @ (inside * self.probabilities[:, None])
        return _labelled(both, self.names, names)


@dataclass(frozen=True)
class SupportDraws:
    """Draws of supports and coefficients; the first two axes are chains and draws.

    Attributes:
        names: of the units.
        columns: names of the coefficients.
        supports: which units are in.
            Shape: (chains, draws, units).
        probabilities: of inclusion given all else, whose mean is ``inclusion``.
            Shape: (chains, draws, units).
        coefficients: 0 where the unit is out.
            Shape: (chains, draws, columns).
        intercept: None without one.
            Shape: (chains, draws).
        noise_scale: of a normal likelihood, else None.
            Shape: (chains, draws).
        inclusion: posterior inclusion probability.
            Shape: (units,).
        inclusion_se: its Monte Carlo standard error.
            Shape: (units,).
        rhat, ess: rank-normalised split R-hat and effective sample size of ``probabilities``, by
            ArviZ; NaN for units whose probability is one number in all draws, R-hat also for one
            chain.
            Shape: (units,).
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    supports: Tensor
    probabilities: Tensor
    coefficients: Tensor
    intercept: Tensor | None
    noise_scale: Tensor | None
    inclusion: Tensor = field(init=False)
    inclusion_se: Tensor = field(init=False)
    rhat: Tensor = field(init=False)
    ess: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rhat, ess = _diagnostics(self.probabilities.numpy())
        spread = self.probabilities.flatten(0, 1).std(0)
        for name, value in {
            "inclusion": self.probabilities.mean((0, 1)),
            "inclusion_se": (spread / ess.sqrt()).nan_to_num(0.0),
            "rhat": rhat,
            "ess": ess,
        }.items():
            object.__setattr__(self, name, value)

    def table(self) -> Any:
        """A DataFrame with a line a unit, the most probable first."""
        values = {
            "inclusion": self.inclusion,
            "se": self.inclusion_se,
            "rhat": self.rhat,
            "ess": self.ess,
        }
        return _table(values, self.names)

    def co_inclusion(self, names: Sequence[str] | None = None) -> Any:
        """A DataFrame of P(both are in), for some units or all.

        Of columns that are nearly copies, each may have a small probability while P(one of them) is
        1: then the entries off the diagonal are far below the products of those on it.
        """
        inside = self.supports.flatten(0, 1).double()
        return _labelled(inside.T @ inside / len(inside), self.names, names)


def _table(values: dict[str, Tensor], names: Sequence[str]) -> Any:
    import pandas as pd

    frame = pd.DataFrame({key: value.numpy() for key, value in values.items()}, index=list(names))
    return frame.sort_values("inclusion", ascending=False, kind="stable")


def _labelled(matrix: Tensor, names: Sequence[str], chosen: Sequence[str] | None) -> Any:
    import pandas as pd

    frame = pd.DataFrame(matrix.numpy(), index=list(names), columns=list(names))
    unknown = sorted(set(chosen or ()) - set(names))
    if unknown:
        raise ValueError(f"no unit is named {unknown}; there are {', '.join(names[:20])}")
    return frame if chosen is None else frame.loc[list(chosen), list(chosen)]


def _diagnostics(values: np.ndarray) -> tuple[Tensor, Tensor]:
    """R-hat and effective sample size of the mean, by the last axis; NaN for constants."""
    import arviz

    found = torch.full((2, values.shape[-1]), math.nan, dtype=torch.float64)
    varies = np.ptp(values, (0, 1)) > 0
    if varies.any():
        data = arviz.convert_to_dataset({"value": values[..., varies]})
        which = torch.as_tensor(varies)
        if len(values) > 1:
            found[0, which] = torch.as_tensor(np.array(arviz.rhat(data)["value"]))
        found[1, which] = torch.as_tensor(np.array(arviz.ess(data, method="mean")["value"]))
    return found[0], found[1]


# -- enumeration -----------------------------------------------------------------------------------


def enumerate_supports(
    x: Any,
    y: Any,
    *,
    likelihood: Normal,
    inclusion: Any = 0.5,
    slab_scale: Any = 1.0,
    groups: Sequence[Any] | None = None,
    intercept: bool = True,
) -> Enumeration:
    """The exact posterior of a normal spike-and-slab regression, over all supports.

    Every support's evidence is closed given the noise precision, and an unknown one is integrated
    out by the trapezoidal rule in its logarithm, to about ten digits.

    Args:
        x: columns; a DataFrame's names are kept.
            Shape: (n, columns).
        y: targets.
            Shape: (n,).
        likelihood: ``ps.likelihoods.Normal()`` with a Gamma prior of the noise precision, or with
            a known ``noise_scale``.
        inclusion: prior inclusion probability of all units, or one each, 0 and 1 allowed, or a
            ``pyro.distributions.Beta`` law of one for all.
        slab_scale: σ0, of all columns or one each, in units of y over those of x: columns should
            have comparable scales.
        groups: a label for each column; columns with one label are in or out together. Each alone
            when absent.
        intercept: add one, with a flat prior.

    Raises:
        ValueError: data or options that do not fit, more than 20 units that are free, or a
            likelihood without closed evidences (use `gibbs`).
    """
    if not isinstance(likelihood, Normal):
        raise ValueError(
            f"supports are enumerated by closed evidences, which {type(likelihood).__name__} does "
            "not have; use gibbs, or a Normal likelihood"
        )
    problem = _problem(x, y, likelihood, inclusion, slab_scale, groups, False)
    free, width = problem.prior.free, problem.precision.shape[1]
    if len(free) > MOST_ENUMERATED:
        raise ValueError(
            f"{len(free)} units have 2^{len(free)} supports; enumerate at most {MOST_ENUMERATED} "
            "and use gibbs for more"
        )
    columns, target = problem.x / np.sqrt(problem.precision.ravel()), problem.y
    if intercept:
        columns, target = columns - columns.mean(0), target - target.mean()
    freedom = len(target) - intercept
    gram, moment, total = columns.T @ columns, columns.T @ target, target @ target
    tau, weight = _precisions(likelihood, gram, moment, total, freedom)
    always = np.flatnonzero(problem.prior.logits == math.inf)
    supports: list[np.ndarray] = []
    evidence: list[np.ndarray] = []
    means: list[np.ndarray] = []
    squares: list[np.ndarray] = []
    for size in range(len(free) + 1):
        chosen = itertools.combinations(free, size)
        while batch := list(itertools.islice(chosen, 512)):
            units = np.array([sorted((*always, *some)) for some in batch], dtype=int)
            inside = np.zeros((len(batch), len(problem.names)), dtype=bool)
            np.put_along_axis(inside, units, True, 1)
            index = (units[..., None] * width + np.arange(width)).reshape(len(batch), -1)
            found = _evidence(gram, moment, total, freedom, index, tau, weight)
            supports.append(inside)
            for values, all_ in zip(found, (evidence, means, squares), strict=True):
                all_.append(values)
    support = np.concatenate(supports)
    log_joint = np.concatenate(evidence) + problem.prior.log_prob(support)
    log_evidence = logsumexp(log_joint)
    probability = np.exp(log_joint - log_evidence)
    scale = problem.precision.ravel()[problem.places] ** -0.5
    mean = (probability @ np.concatenate(means))[problem.places] * scale
    square = (probability @ np.concatenate(squares))[problem.places] * scale**2
    constant = -0.5 * math.log(len(target)) if intercept else 0.0
    return Enumeration(
        problem.names,
        problem.columns,
        torch.as_tensor(support),
        torch.as_tensor(probability),
        torch.as_tensor(probability @ support),
        torch.as_tensor(mean),
        torch.as_tensor(np.sqrt(np.maximum(square - mean**2, 0.0))),
        float(log_evidence + constant),
    )


def _precisions(
    likelihood: Normal, gram: np.ndarray, moment: np.ndarray, total: float, freedom: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of the noise precision, and log weights with its prior, ``(nodes,)`` each."""
    known, shape, rate = noise_prior(likelihood)
    if known is not None:
        return np.array([known]), np.zeros(1)
    # Log-concave in log τ, narrowest with all that τ can be explained by, exponentially decaying
    # below and faster above.
    full = shape + freedom / 2
    left = max(total - moment @ np.linalg.lstsq(gram, moment)[0], 0.0)
    low = math.log(full / (rate + total / 2)) - 45 / min(full, shape + 1) - 3
    low = max(low, math.log(full / (rate + total / 2)) - 45 / full - 8 / math.sqrt(full))
    high = math.log(full / (rate + left / 2)) + 12 / math.sqrt(full) + 4 / full
    nodes = max(64, math.ceil((high - low) * math.sqrt(full) / 0.35))
    log_tau, step = np.linspace(low, high, nodes, retstep=True)
    law = shape * math.log(rate) - math.lgamma(shape) + shape * log_tau - rate * np.exp(log_tau)
    return np.exp(log_tau), law + math.log(step)


def _evidence(
    gram: np.ndarray,
    moment: np.ndarray,
    total: float,
    freedom: int,
    index: np.ndarray,
    tau: np.ndarray,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log evidences of supports, and first and second moments of all coefficients.

    Args:
        gram, moment, total: XᵀX, Xᵀy and yᵀy of columns whose slabs have scale 1.
        freedom: examples, less one for a mean that was taken out.
        index: columns of each support.
            Shape: (supports, columns in it).
        tau, weight: nodes of the noise precision and their log weights.
            Shape: (nodes,).
    """
    values, vectors = np.linalg.eigh(gram[index[:, :, None], index[:, None, :]])
    values = np.maximum(values, 0.0)[:, None]  # (supports, 1, size)
    rotated = np.einsum("sij,si->sj", vectors, moment[index])[:, None]
    shrunk = 1 / (1 + tau[:, None] * values)  # (supports, nodes, size)
    fit = (shrunk * rotated**2).sum(-1) * tau**2
    log_joint = weight + 0.5 * (
        freedom * np.log(tau / (2 * math.pi)) - tau * total + fit + np.log(shrunk).sum(-1)
    )
    evidence = logsumexp(log_joint, axis=1)
    share = np.exp(log_joint - evidence[:, None])
    mean = np.einsum("sij,snj->sni", vectors, tau[:, None] * shrunk * rotated)
    variance = np.einsum("sij,snj->sni", vectors**2, shrunk)
    first, second = np.zeros((2, len(index), len(moment)))
    np.put_along_axis(first, index, np.einsum("sn,sni->si", share, mean), 1)
    np.put_along_axis(second, index, np.einsum("sn,sni->si", share, variance + mean**2), 1)
    return evidence, first, second


# -- the sampler -----------------------------------------------------------------------------------


def gibbs(
    x: Any,
    y: Any,
    *,
    likelihood: Likelihood,
    inclusion: Any = 0.5,
    slab_scale: Any = 1.0,
    groups: Sequence[Any] | None = None,
    intercept: bool = True,
    num_samples: int = 1000,
    warmup: int = 500,
    num_chains: int = 4,
    seed: int = 0,
) -> SupportDraws:
    r"""Draws from the exact posterior of a (generalised) linear spike-and-slab regression.

    Every draw is a scan of all units, each drawn from its probability given all others with the
    coefficients integrated out, and some swaps of one unit for another; then the coefficients, and
    the noise precision or, for 0/1 targets, the Pólya-Gamma weights that make them Gaussian. Counts
    are Gaussian by no such weights: supports and coefficients are proposed by approximations at the
    mode and accepted or not, which is as exact, but makes draws dearer and more alike.

    Chains start at random supports; where ``rhat`` is above 1.01 they have not met, and more draws
    are needed.

    Args:
        x: columns; a DataFrame's names are kept.
            Shape: (n, columns).
        y: targets.
            Shape: (n,).
        likelihood: ``ps.likelihoods.Normal`` (with a Gamma prior of the noise precision, or a known
            ``noise_scale``), ``Bernoulli`` or ``Poisson`` (with logarithmic link).
        inclusion: prior inclusion probability of all units, or one each, 0 and 1 allowed, or a
            ``pyro.distributions.Beta`` law of one for all.
        slab_scale: σ0, of all columns or one each, in units of y (or of log-odds) over those of x:
            columns should have comparable scales.
        groups: a label for each column; columns with one label are in or out together. Each alone
            when absent.
        intercept: add one, with a flat prior.
        num_samples: draws a chain that are kept.
        warmup: draws a chain before those.
        num_chains: independent chains.
        seed: of NumPy's generators, one a chain; no global state is read or changed.

    Raises:
        ValueError: data or options that do not fit, or another likelihood.

    Source: George, McCulloch (Statistica Sinica 7, 1997) for the collapsed conditionals; Polson,
    Scott, Windle (JASA 108, 2013) for 0/1 targets.
    """
    kernels = {Normal: normal_chain, Bernoulli: logistic_chain, Poisson: poisson_chain}
    if type(likelihood) not in kernels:
        raise ValueError(
            f"gibbs knows {', '.join(kind.__name__ for kind in kernels)} likelihoods, got "
            f"{type(likelihood).__name__}"
        )
    whole(4, num_samples=num_samples)
    whole(num_chains=num_chains)
    whole(0, warmup=warmup)
    problem = _problem(x, y, likelihood, inclusion, slab_scale, groups, intercept)
    chains = []
    for chain in range(num_chains):
        rng = np.random.default_rng([seed, chain])
        draws = kernels[type(likelihood)](problem, likelihood, start(problem, rng), rng)
        chains.append(list(itertools.islice(draws, warmup, warmup + num_samples)))
    units, places = len(problem.names), problem.places

    def stacked(get: Any) -> Tensor:
        return torch.as_tensor(np.array([[get(draw) for draw in draws] for draws in chains]))

    width = problem.precision.shape[1]
    return SupportDraws(
        problem.names,
        problem.columns,
        stacked(lambda draw: draw.included[:units]),
        stacked(lambda draw: draw.probability[:units]),
        stacked(lambda draw: draw.beta[places]),
        stacked(lambda draw: draw.beta[-width]) if intercept else None,
        stacked(lambda draw: draw.noise_scale) if isinstance(likelihood, Normal) else None,
    )
