"""ArviZ objects from plain NumPy arrays, for ArviZ 0.2x (InferenceData) and 1.x (DataTree).

Both lines know the same groups, but take them differently; `build` hides that, `save` and `load`
write and read netCDF, and `loo` is leave-one-out corrected for a posterior that is approximate.
:meth:`Posterior.to_arviz <pyro_sparse.posterior.Posterior.to_arviz>` collects the arrays. Nothing
here needs torch.

R-hat, effective sample sizes and trace plots say nothing about independent draws of a guide, which
stand here as one chain; forest plots, posterior predictive checks and `loo` do.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Loo", "build", "load", "loo", "save"]

WITHOUT_DRAWS = ("observed_data", "constant_data")
"""Groups whose variables have no axis of draws."""


def _arviz() -> tuple[Any, bool]:
    """ArviZ, and whether it is of the 1.x line."""
    import arviz

    return arviz, int(arviz.__version__.split(".")[0]) >= 1


def build(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    coords: Mapping[str, Sequence[Any]],
    dims: Mapping[str, Sequence[str]],
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """An InferenceData or a DataTree, whichever the installed ArviZ has.

    Args:
        groups: ``{group: {variable: values}}``, with ``(draws, ...)`` in all groups but
            `WITHOUT_DRAWS`; empty groups are left out.
        coords: labels of each dimension; those without any count from 0.
        dims: names of the dimensions of each variable, without that of draws. A variable has the
            same ones in all groups.
        attrs: of the whole object, numbers and texts.
    """
    az, new = _arviz()
    data = {
        group: {
            name: values if group in WITHOUT_DRAWS else values[None]
            for name, values in variables.items()
        }
        for group, variables in groups.items()
        if variables
    }
    shared: dict[str, Any] = {
        "coords": {name: list(labels) for name, labels in coords.items()},
        "dims": {name: list(of) for name, of in dims.items()},
    }
    made = az.from_dict(data, **shared) if new else az.from_dict(**data, **shared)
    made.attrs.update(attrs or {})
    return made


def save(data: Any, path: str | Path) -> None:
    """Write what `build` made as a netCDF file."""
    data.to_netcdf(str(path), engine="h5netcdf")


def load(path: str | Path) -> Any:
    """Read what `save` wrote, wholly into memory.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file")
    az, new = _arviz()
    data = az.from_netcdf(str(path), engine="h5netcdf")
    if not new:
        return data
    with data:
        return data.load()


# -- leave-one-out ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loo:
    """Expected log predictive density of new data by leave-one-out, nats.

    Attributes:
        elpd: its estimate, a sum over examples.
        se: standard error of that.
        p: effective number of parameters: what fitting the examples themselves adds.
        elpd_i: by example.
            Shape: (N,).
        pareto_k: tail index of the importance ratios by example; above 0.7 an estimate is not to be
            trusted.
            Shape: (N,).
    """

    elpd: float
    se: float
    p: float
    elpd_i: np.ndarray
    pareto_k: np.ndarray


def loo(data: Any) -> Loo:
    r"""Pareto-smoothed leave-one-out, corrected for draws that come from q and not from p(θ | y).

    With draws :math:`θ_s ∼ q` the importance ratios for leaving out example ``i`` are
    :math:`r_{is} ∝ p(θ_s, y) / \{q(θ_s) p(y_i | θ_s)\}`; Pareto smoothing makes weights of them,
    and :math:`\text{elpd}_i = \log Σ_s w_{is} p(y_i | θ_s)`. ArviZ 1.x has this as
    ``loo_approximate_posterior``; with 0.2x the same is computed from its ``psislw``.

    In thousands of dimensions q and p(θ | y) differ so much that one draw takes all the weight; the
    values of ``pareto_k`` say so.

    Args:
        data: with the groups ``log_likelihood`` (variable ``y``) and ``sample_stats`` (``log_p``,
            ``log_q``), which ``to_arviz`` writes when it is given the training data.

    Raises:
        ValueError: these are not there.

    Source: Magnusson, Andersen, Jonasson, Vehtari (ICML 2019), eq. 8; smoothing: Vehtari, Simpson,
    Gelman, Yao, Gabry (JMLR 25, 2024).
    """
    az, new = _arviz()
    names = [str(name).strip("/") for name in (data.children if new else data.groups())]
    if not {"log_likelihood", "sample_stats"} <= set(names):
        raise ValueError(
            "expected the groups log_likelihood and sample_stats; to_arviz(x, y) writes them when "
            f"x and y are all of the training data. Got {', '.join(names)}"
        )
    log_p, log_q = data["sample_stats"]["log_p"], data["sample_stats"]["log_q"]
    if new:
        with warnings.catch_warnings():
            # What pareto_k says is for the caller to read, with both lines.
            warnings.filterwarnings("ignore", "Estimated shape parameter", UserWarning)
            # Ratios do not change with a constant, and exponentials of large numbers do not
            # survive.
            found = az.loo_approximate_posterior(
                data, log_p - log_p.max(), log_q - log_q.max(), var_name="y", pointwise=True
            )
        elpd_i, pareto_k = found.elpd_i, found.pareto_k
        return Loo(found.elpd, found.se, found.p, np.asarray(elpd_i), np.asarray(pareto_k))
    log_likelihood = np.asarray(data["log_likelihood"]["y"], dtype=np.float64)[0]
    return _smoothed(log_likelihood, np.asarray(log_p - log_q)[0], az.psislw)


def _smoothed(log_likelihood: np.ndarray, log_ratio: np.ndarray, psislw: Any) -> Loo:
    """`loo` of log-likelihoods ``(draws, N)`` and log p − log q ``(draws,)``."""
    log_weights = (log_ratio[:, None] - log_likelihood).T
    log_weights, pareto_k = psislw(log_weights - log_weights.max(1, keepdims=True))
    elpd_i = _logsumexp(np.asarray(log_weights) + log_likelihood.T)
    fitted = _logsumexp(log_likelihood.T) - np.log(len(log_likelihood))
    count = len(elpd_i)
    return Loo(
        float(elpd_i.sum()),
        float(np.sqrt(count * elpd_i.var())),
        float((fitted - elpd_i).sum()),
        elpd_i,
        np.asarray(pareto_k),
    )


def _logsumexp(values: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    top = values.max(-1, keepdims=True)
    return (np.log(np.exp(values - top).sum(-1, keepdims=True)) + top)[..., 0]
