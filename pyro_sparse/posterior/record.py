"""Draws of posterior and prior as NumPy arrays with names: what goes into an ArviZ object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_sparse.likelihoods import Normal
from pyro_sparse.modules import own_parameters

from .exact import ExactDraws

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["Recorded", "record"]


class Draw(NamedTuple):
    """One draw of everything.

    rows:    effective rows by group, ``(units, row length)``
    gate:    on the input features, ``(features,)``, or None
    latents: of the likelihood
    sites:   values of all sample statements
    log_p:   log density of the prior at them
    log_q:   of the guide; 0 for draws of the prior
    """

    rows: dict[str, Tensor]
    gate: Tensor | None
    latents: dict[str, Tensor]
    sites: dict[str, Tensor]
    log_p: float
    log_q: float


@dataclass
class Recorded:
    """Arrays by group and name, with the labels of their dimensions; see `arviz.build`."""

    groups: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    coords: dict[str, list[Any]] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)


@torch.no_grad()
def record(
    posterior: Posterior,
    x: Tensor | None,
    y: Tensor | None,
    num_samples: int,
    rows: bool,
    batch_size: int,
) -> Recorded:
    """See :meth:`Posterior.to_arviz <pyro_sparse.posterior.Posterior.to_arviz>`."""
    if num_samples < 1:
        raise ValueError(f"expected at least one draw, got num_samples={num_samples}")
    if y is not None:
        if x is None:
            raise ValueError("expected the inputs x of the targets y, got None")
        if len(y) != len(x):
            raise ValueError(f"expected as many targets as inputs, got {len(y)} for {len(x)}")
    model, out = posterior.model, Recorded()
    collect = {"posterior": _posterior_draws(posterior)}
    if _proper(posterior):
        collect["prior"] = _prior_draws(posterior)
    for kind, draws in collect.items():
        variables: dict[str, list[Any]] = {}
        predictive: dict[str, list[Any]] = {}
        likelihood: list[Tensor] = []
        stats: dict[str, list[float]] = {"log_p": [], "log_q": []}
        with own_parameters(model, posterior.guide), pyro.validation_enabled(False):
            for _ in range(num_samples):
                draw = next(draws)
                for name, value in _variables(posterior, draw, rows, out).items():
                    variables.setdefault(name, []).append(value)
                if x is None:
                    continue
                output = posterior.outputs(x, draw.rows, draw.gate, batch_size)
                latents = {name: value.to(x.device) for name, value in draw.latents.items()}
                law = model.likelihood.distribution(output, **latents)
                predictive.setdefault("y", []).append(law.sample())
                natural = model.likelihood.natural(output)
                predictive.setdefault(_natural_name(posterior), []).append(natural)
                if y is not None and kind == "posterior":
                    likelihood.append(law.log_prob(y))
                    stats["log_p"].append(draw.log_p + float(likelihood[-1].double().sum()))
                    stats["log_q"].append(draw.log_q)
        out.groups[kind] = _stacked(variables)
        out.groups[f"{kind}_predictive"] = _stacked(predictive)
        if likelihood:
            out.groups["log_likelihood"] = _stacked({"y": likelihood})
        # The joint density is that of the posterior only if these are the data it is of.
        if likelihood and y is not None and len(y) == model.num_data:
            out.groups["sample_stats"] = {key: np.array(value) for key, value in stats.items()}
    _describe(posterior, x, y, out)
    return out


# -- draws -----------------------------------------------------------------------------------------


def _posterior_draws(posterior: Posterior) -> Iterator[Draw]:
    while True:
        with ExactDraws():
            trace = poutine.trace(posterior.guide).get_trace()
        with poutine.replay(trace=trace):
            draw = _of_model(posterior)
        # Under replay the sites' values are those of the guide, and log p is the prior's at them.
        yield draw._replace(log_q=_log_density(trace))


def _prior_draws(posterior: Posterior) -> Iterator[Draw]:
    while True:
        yield _of_model(posterior)


def _of_model(posterior: Posterior) -> Draw:
    model = posterior.model
    with poutine.trace() as tracer:
        rows, gate = model.latents()
        latents = model.likelihood.sites()
    trace = tracer.trace
    sites: dict[str, Any] = {
        name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"
    }
    effective = {name: model.support.rows(name, value) for name, value in rows.items()}
    return Draw(effective, gate, latents, sites, _log_density(trace), 0.0)


def _log_density(trace: Any) -> float:
    """Sum over the sites in float64: thousands of weights cost float32 its last digits."""
    trace.compute_log_prob()
    return sum(
        float(site["log_prob"].double().sum())
        for site in trace.nodes.values()
        if site["type"] == "sample"
    )


@torch.no_grad()
def _proper(posterior: Posterior) -> bool:
    """Whether the prior can be sampled; random numbers are given back."""
    with (
        torch.random.fork_rng([]),
        own_parameters(posterior.model, posterior.guide),
        pyro.validation_enabled(False),
    ):
        try:
            _of_model(posterior)
        except NotImplementedError:
            return False
    return True


# -- names and shapes ------------------------------------------------------------------------------


def _variables(posterior: Posterior, draw: Draw, rows: bool, out: Recorded) -> dict[str, Tensor]:
    """What a draw is told by; fills in the names of dimensions."""
    variables: dict[str, Tensor] = {}
    counts = []
    for name in posterior.inclusion():
        inside = _inclusion(draw, name)
        variables[f"{name}.inclusion"] = inside.to(torch.int8)
        out.dims[f"{name}.inclusion"] = [f"{name}.unit"]
        counts.append(int(inside.sum()))
    if counts:
        variables["units_included"] = torch.tensor(counts)
        out.dims["units_included"] = ["group"]
        out.coords["group"] = list(posterior.inclusion())
    for name, value in draw.rows.items():
        variables[f"{name}.norm"] = value.norm(dim=1)
        out.dims[f"{name}.norm"] = [f"{name}.unit"]
        if rows:
            variables[f"{name}.rows"] = value
            out.dims[f"{name}.rows"] = [f"{name}.unit", f"{name}.weight"]
    for name, value in draw.sites.items():
        group = name.rpartition(".")[0]
        if name == "input.gate" or name.endswith((".rows", ".support")):
            continue  # told as inclusions and effective rows
        dims = [f"{name}.{axis}" for axis in range(value.dim())]
        units = {one.name: one.size for one in posterior.model.graph}.get(group)
        if dims and value.shape[0] == units:
            dims[0] = f"{group}.unit"
        variables[name], out.dims[name] = value, dims
    if isinstance(posterior.model.likelihood, Normal) and "noise_precision" in draw.latents:
        variables["noise_scale"] = draw.latents["noise_precision"].rsqrt()
        out.dims["noise_scale"] = []
    return variables


def _inclusion(draw: Draw, name: str) -> Tensor:
    """Whether each unit of a group is in, ``(units,)``."""
    support = draw.sites.get(f"{name}.support")
    if support is not None:
        return support.reshape(len(support), -1).amax(1) > 0.5
    if name == "input":
        return draw.sites["input.gate"] != 0
    return (draw.rows[name] != 0).any(1)


def _natural_name(posterior: Posterior) -> str:
    """``mean`` of a number, ``probability`` of classes; a Bernoulli's mean is one."""
    return "mean" if _classes(posterior) is None else "probability"


def _classes(posterior: Posterior) -> int | None:
    like = torch.zeros(1, 2)
    probabilities = posterior.model.likelihood.class_probabilities(like)
    return None if probabilities is None else probabilities.shape[-1]


def _stacked(values: Mapping[str, list[Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.stack(one).cpu().numpy() for name, one in values.items()}


def _describe(posterior: Posterior, x: Tensor | None, y: Tensor | None, out: Recorded) -> None:
    """Data, constants, and labels of what all groups share."""
    constants: dict[str, np.ndarray] = {}
    for name, value in posterior.inclusion().items():
        constants[f"{name}.inclusion_probability"] = value.numpy()
        out.dims[f"{name}.inclusion_probability"] = [f"{name}.unit"]
    if x is not None:
        constants["x"] = x.cpu().numpy()
        axes = [f"input.{axis}" for axis in range(1, x.dim())]
        if len(axes) == 1 and x.shape[1] == posterior.model.graph["input"].size:
            axes = ["input.unit"]
        out.dims["x"] = ["observation", *axes]
        out.dims["y"] = ["observation"]
        natural = out.groups["posterior_predictive"][_natural_name(posterior)]
        out.dims[_natural_name(posterior)] = ["observation", "class"][: natural.ndim - 1]
    if y is not None:
        out.groups["observed_data"] = {"y": y.cpu().numpy()}
    out.groups["constant_data"] = constants
