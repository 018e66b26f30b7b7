"""Draws of posterior and prior as NumPy arrays with names: what goes into an ArviZ object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sparse.inputs import as_rows
from pyro_sparse.likelihoods import Normal

from .draws import measuring
from .network import FittedNetwork, NetworkDraw

__all__ = ["Recorded", "record"]


@dataclass
class Recorded:
    """Arrays by group and name, with the labels of their dimensions; see `arviz.build`."""

    groups: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    coords: dict[str, list[Any]] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)


@torch.no_grad()
def record(
    posterior: FittedNetwork,
    x: Any,
    y: Tensor | None,
    num_samples: int,
    rows: bool,
    batch_size: int,
) -> Recorded:
    """See :meth:`Posterior.to_arviz <pyro_sparse.posterior.Posterior.to_arviz>`."""
    x = as_rows(x)
    if y is not None:
        if x is None:
            raise ValueError("expected the inputs x of the targets y, got None")
        if len(y) != len(x):
            raise ValueError(f"expected as many targets as inputs, got {len(y)} for {len(x)}")
    model, out = posterior.model, Recorded()
    for kind in ("posterior", "prior") if _proper(posterior) else ("posterior",):
        variables: dict[str, list[Any]] = {}
        predictive: dict[str, list[Any]] = {}
        likelihood: list[Tensor] = []
        stats: dict[str, list[float]] = {"log_p": [], "log_q": []}
        with measuring(model, posterior.guide):
            for draw in posterior.network_draws(num_samples, prior=kind == "prior"):
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
                    stats["log_p"].append(draw.joint.log_p + float(likelihood[-1].double().sum()))
                    stats["log_q"].append(draw.joint.log_q)
        out.groups[kind] = _stacked(variables)
        out.groups[f"{kind}_predictive"] = _stacked(predictive)
        if likelihood:
            out.groups["log_likelihood"] = _stacked({"y": likelihood})
        # The joint density is that of the posterior only if these are the data it is of.
        if likelihood and y is not None and len(y) == model.num_data:
            out.groups["sample_stats"] = {key: np.array(value) for key, value in stats.items()}
    _describe(posterior, x, y, out)
    return out


def _proper(posterior: FittedNetwork) -> bool:
    """Whether the prior can be sampled; random numbers are given back."""
    with torch.random.fork_rng([]):
        try:
            next(posterior.network_draws(1, prior=True))
        except NotImplementedError:
            return False
    return True


# -- names and shapes ------------------------------------------------------------------------------


def _variables(
    posterior: FittedNetwork, draw: NetworkDraw, rows: bool, out: Recorded
) -> dict[str, Tensor]:
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
    for name, value in draw.joint.sites.items():
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


def _inclusion(draw: NetworkDraw, name: str) -> Tensor:
    """Whether each unit of a group is in, ``(units,)``."""
    support = draw.joint.sites.get(f"{name}.support")
    if support is not None:
        return support.reshape(len(support), -1).amax(1) > 0.5
    if name == "input":
        return draw.joint.sites["input.gate"] != 0
    return (draw.rows[name] != 0).any(1)


def _natural_name(posterior: FittedNetwork) -> str:
    """``mean`` of a number, ``probability`` of classes; a Bernoulli's mean is one."""
    return "mean" if _classes(posterior) is None else "probability"


def _classes(posterior: FittedNetwork) -> int | None:
    like = torch.zeros(1, 2)
    probabilities = posterior.model.likelihood.class_probabilities(like)
    return None if probabilities is None else probabilities.shape[-1]


def _stacked(values: Mapping[str, list[Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.stack(one).cpu().numpy() for name, one in values.items()}


def _describe(posterior: FittedNetwork, x: Any, y: Tensor | None, out: Recorded) -> None:
    """Data, constants, and labels of what all groups share."""
    constants: dict[str, np.ndarray] = {}
    for name, value in posterior.inclusion().items():
        constants[f"{name}.inclusion_probability"] = value.numpy()
        out.dims[f"{name}.inclusion_probability"] = [f"{name}.unit"]
    if isinstance(x, Tensor):
        constants["x"] = x.cpu().numpy()
        axes = [f"input.{axis}" for axis in range(1, x.dim())]
        if len(axes) == 1 and x.shape[1] == posterior.model.graph["input"].size:
            axes = ["input.unit"]
        out.dims["x"] = ["observation", *axes]
    if x is not None:
        predictive = out.groups["posterior_predictive"]["y"]
        out.dims["y"] = ["observation", *(f"target.{axis}" for axis in range(2, predictive.ndim))]
        natural = out.groups["posterior_predictive"][_natural_name(posterior)]
        if natural.ndim < 4:
            out.dims[_natural_name(posterior)] = ["observation", "class"][: natural.ndim - 1]
    if y is not None:
        out.groups["observed_data"] = {"y": y.cpu().numpy()}
    out.groups["constant_data"] = constants
