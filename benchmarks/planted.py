"""Planted truth: are the inputs that matter found, are PIPs calibrated, how fast is contraction?

Teacher networks: 20 inputs of which 5 matter, 8 tanh units; students have 50, n = 500, 2000, 8000.
More columns than rows: linear regression and one hidden layer, 1000 inputs of which 10 matter,
n = 300. Weak signals (`--weak`): linear regression on 40 inputs, drawn from the model's own prior,
where exact inclusion probabilities lie in between; fitted with two estimators of the inclusions.
Every fit is a line of a JSON file, done ones are skipped, so seeds can be added later::

    python -m benchmarks.planted --seeds 10 --out runs/planted.jsonl

What came out, and how the schedule was chosen: docs/planted.md. A fit takes a quarter of a minute
on a free core. `--report` prints the tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_sparse as ps
from pyro_sparse.infer.schedules import Schedule, constant, ramp
from pyro_sparse.posterior import Curve, Posterior, theoretical_rate
from pyro_sparse.posterior.contraction import fitted_rate
from pyro_sparse.runs.parallel import Failed, call_in_processes

MODELS = {
    "ss-ig": ps.models.SpikeSlabGaussian,
    "ss-gl": ps.models.SpikeSlabGroupLasso,
    "ss-ghs": ps.models.SpikeSlabGroupHorseshoe,
}
INPUTS, ACTIVE, TEACHER, STUDENT, NOISE = 20, 5, 8, 50, 0.1
SIZES = (500, 2000, 8000)
BINS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
WEAK_PRIOR = 0.3
WEAK_ESTIMATORS = {"straight-through": 1, "score": 4}
"""Estimators of the inclusions' gradient, and draws a step."""


def teacher(seed: int, size: int = SIZES[-1], test: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, noisy targets and true means, ``size + test`` of each; the mean has unit variance."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight, bias = 0.8 * normal(TEACHER, ACTIVE), 0.5 * normal(TEACHER)
    readout, x = normal(TEACHER), normal(size + test, INPUTS)
    truth = torch.tanh(x[:, :ACTIVE] @ weight.T + bias) @ readout
    truth = (truth - truth.mean()) / truth.std()
    return x, truth + NOISE * normal(size + test), truth


def wide(seed: int, size: int = 300, inputs: int = 1000, active: int = 10) -> tuple[Tensor, Tensor]:
    """Inputs and standardised targets of a linear truth, effects of ±½ to ±3/2, noise ½."""
    generator = torch.Generator().manual_seed(2000 + seed)
    x = torch.randn(size, inputs, generator=generator)
    sign = torch.randn(active, generator=generator).sign()
    beta = sign * (0.5 + torch.rand(active, generator=generator))
    y = x[:, :active] @ beta + 0.5 * torch.randn(size, generator=generator)
    return x, (y - y.mean()) / y.std()


def weak(
    seed: int, size: int = 120, inputs: int = 40, effect: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets of noise 1, and which inputs matter: each with probability `WEAK_PRIOR`.

    Effects are N(0, effect²), about two standard errors: truths are drawn from the very prior of
    the model, so that exact inclusion probabilities are calibrated.
    """
    generator = torch.Generator().manual_seed(3000 + seed)
    x = torch.randn(size, inputs, generator=generator)
    inside = torch.rand(inputs, generator=generator) < WEAK_PRIOR
    beta = effect * torch.randn(inputs, generator=generator) * inside
    return x, x @ beta + torch.randn(size, generator=generator), inside


def fit(
    model: str,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    seed: int,
    *,
    inclusion: float,
    batch: int,
    steps: int,
    inclusion_lr: float,
    kl_weight: Schedule,
    estimator: str = "straight-through",
    num_particles: int = 1,
    output_scale: float = 1.0,
) -> Posterior:
    """Steps of Adam at 0.01, logits at ``inclusion_lr``."""
    size = len(x)
    sparse = MODELS[model](
        net, x[:2], likelihood=ps.likelihoods.Normal(), num_data=size, prune_inputs=True,
        input_inclusion_probability=inclusion, output_scale=output_scale,
    )  # fmt: skip
    guide = ps.guides.for_model(sparse, inclusion=estimator)
    loader = ps.data.Batches(x, y, min(batch, size), seed=seed)
    ps.fit(
        sparse, guide, loader, epochs=max(1, round(steps / len(loader))), lr=1e-2, seed=seed,
        inclusion_lr=inclusion_lr, kl_weight=kl_weight, num_particles=num_particles,
        progress=False,
    )  # fmt: skip
    return Posterior(sparse, guide)


def planted(model: str, seed: int, size: int, steps: int) -> dict[str, Any]:
    """One student of one teacher."""
    x, y, truth = teacher(seed)
    torch.manual_seed(seed)
    net = ps.nets.mlp([INPUTS, STUDENT, 1], "tanh")
    posterior = fit(
        model, net, x[:size], y[:size], seed,
        inclusion=0.25, batch=256, steps=steps, inclusion_lr=0.02, kl_weight=constant(),
    )  # fmt: skip
    around = posterior.radius(x[SIZES[-1] :], truth[SIZES[-1] :])
    pip = posterior.inclusion()
    return {
        "pip": [round(value, 5) for value in pip["input"].tolist()],
        "hidden": float(pip["fc1"].sum()),
        "radius": around.quantile(0.95),
        "theory": theoretical_rate(posterior),
    }


def wide_case(model: str, kind: str, seed: int, steps: int) -> dict[str, Any]:
    """One regression with more columns than rows."""
    x, y = wide(seed)
    torch.manual_seed(seed)
    inputs = x.shape[1]
    net = (
        nn.Sequential(nn.Linear(inputs, 1))
        if kind == "linear"
        else ps.nets.mlp([inputs, 20, 1], "tanh")
    )
    posterior = fit(
        model, net, x, y, seed,
        inclusion=0.01, batch=300, steps=steps, inclusion_lr=0.1, kl_weight=ramp(0.1, 0.2, 0.4),
    )  # fmt: skip
    pip = posterior.inclusion()["input"]
    return {
        "true": int((pip[:10] > 0.5).sum()),
        "false": int((pip[10:] > 0.5).sum()),
        "expected": float(pip.sum()),
    }


def weak_case(model: str, seed: int, steps: int) -> dict[str, Any]:
    """One regression with weak signals: exact inclusion probabilities, and each estimator's."""
    x, y, inside = weak(seed)
    exact = ps.infer.gibbs(
        x, y, likelihood=ps.likelihoods.Normal(1.0), inclusion=WEAK_PRIOR, slab_scale=0.2,
        intercept=False, num_chains=1, num_samples=1500,
    )  # fmt: skip
    found = {"exact": exact.inclusion}
    for estimator, particles in WEAK_ESTIMATORS.items():
        torch.manual_seed(seed)
        posterior = fit(
            model, nn.Sequential(nn.Linear(x.shape[1], 1, bias=False)), x, y, seed,
            inclusion=WEAK_PRIOR, batch=len(x), steps=steps, inclusion_lr=0.02,
            kl_weight=constant(), estimator=estimator, num_particles=particles, output_scale=0.2,
        )  # fmt: skip
        found[estimator] = posterior.inclusion()["input"]
    pips = {name: [round(p, 4) for p in pip.tolist()] for name, pip in found.items()}
    return {"inside": inside.tolist(), "pips": pips}


def f1(pip: Sequence[float]) -> float:
    """F1 of the inputs with PIP > ½; the first `ACTIVE` matter."""
    chosen = [value > 0.5 for value in pip]
    hits = sum(chosen[:ACTIVE])
    return 2 * hits / (sum(chosen) + ACTIVE)


def print_calibration(pairs: Sequence[tuple[float, bool]]) -> None:
    """A line a bin: mean inclusion probability beside the share that matters."""
    for low, high in pairwise(BINS):
        inside = [(p, t) for p, t in pairs if low <= p < high or p == high == 1]
        if inside:
            mean = sum(p for p, _ in inside) / len(inside)
            share = sum(t for _, t in inside) / len(inside)
            error = (mean * (1 - mean) / len(inside)) ** 0.5
            print(f"  {low:.2f}–{high:.2f}: {len(inside):4d} inputs, mean PIP {mean:.3f}, "
                  f"true {share:.3f} (± {error:.3f} if calibrated)")  # fmt: skip


def report(records: Sequence[dict[str, Any]]) -> None:
    """Tables of all records."""
    for model in MODELS:
        runs = [r for r in records if r["case"] == "teacher" and r["model"] == model]
        sizes = sorted({r["size"] for r in runs})
        for size in sizes:
            here = [r for r in runs if r["size"] == size]
            scores = [f1(r["pip"]) for r in here]
            hidden = sum(r["hidden"] for r in here) / len(here)
            print(
                f"{model} n={size}: F1 mean {sum(scores) / len(here):.3f} least {min(scores):.3f}, "
                f"hidden units {hidden:.1f}, {len(here)} seeds"
            )
        # Seeds with all sizes only: the curve is fitted within seeds.
        seeds = [s for s in sorted({r["seed"] for r in runs})
                 if {r["size"] for r in runs if r["seed"] == s} == set(sizes)]  # fmt: skip
        if len(sizes) > 1 and seeds:
            at = {(r["seed"], r["size"]): r for r in runs}
            radii, theory = (
                torch.tensor([[at[s, n][key] for n in sizes] for s in seeds], dtype=torch.float64)
                for key in ("radius", "theory")
            )
            rate = fitted_rate(sizes, radii)
            known = tuple(theory.log().mean(0).exp().tolist())
            print(f"{model}, {len(seeds)} seeds")
            print(Curve(tuple(sizes), radii, *rate, "L2", known))
        if runs:
            print(f"{model} calibration of input PIPs, all sizes and seeds")
            print_calibration([(p, i < ACTIVE) for r in runs for i, p in enumerate(r["pip"])])
        signals = [r for r in records if r["case"] == "weak" and r["model"] == model]
        for name in ("exact", *WEAK_ESTIMATORS) if signals else ():
            pips = torch.tensor([r["pips"][name] for r in signals])
            exact = torch.tensor([r["pips"]["exact"] for r in signals])
            away = (pips - exact).abs()
            print(f"{model} weak signals, {len(signals)} seeds, {name}: from the exact PIP mean "
                  f"{away.mean():.3f} most {away.max():.3f}")  # fmt: skip
            inside = [t for r in signals for t in r["inside"]]
            print_calibration(list(zip(pips.flatten().tolist(), inside, strict=True)))
        for kind in ("linear", "hidden"):
            for r in records:
                if r["case"] == kind and r["model"] == model:
                    print(f"{model} {kind} p=1000 n=300 seed {r['seed']}: true {r['true']} of 10, "
                          f"false {r['false']}, expected {r['expected']:.1f}")  # fmt: skip


def one(key: dict[str, Any]) -> dict[str, Any]:
    """The record of one fit, or of the fits to one regression with weak signals."""
    model, seed, size, steps = (key[name] for name in ("model", "seed", "size", "steps"))
    started = time.perf_counter()
    if key["case"] == "teacher":
        found = planted(model, seed, size, steps)
    elif key["case"] == "weak":
        found = weak_case(model, seed, steps)
    else:
        found = wide_case(model, key["case"], seed, steps)
    return {**key, **found, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="ss-ig")
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 … of every case")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--jobs", type=int, default=1, help="fits at a time")
    parser.add_argument("--weak", action="store_true", help="weak signals, too")
    kinds = ["linear", "hidden"]
    parser.add_argument("--wide", nargs="*", choices=kinds, default=kinds)
    parser.add_argument("--steps", type=int, default=2500, help="gradient steps of a fit")
    parser.add_argument("--out", type=Path, default=Path("runs/planted.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the tables and fit nothing")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def known() -> list[dict[str, Any]]:
        if not arguments.out.is_file():
            return []
        return [json.loads(line) for line in arguments.out.read_text().splitlines()]

    cases: list[tuple[str, int]] = [(kind, 300) for kind in arguments.wide]
    cases += [("teacher", size) for size in arguments.sizes]
    cases += [("weak", 120)] if arguments.weak else []
    keys = [
        {
            "case": case,
            "model": arguments.model,
            "seed": seed,
            "size": size,
            "steps": arguments.steps,
        }
        for seed in range(0 if arguments.report else arguments.seeds)
        for case, size in cases
    ]
    done = known()
    keys = [key for key in keys if not any(key.items() <= record.items() for record in done)]
    for _, record in call_in_processes(one, [(key,) for key in keys], arguments.jobs):
        if isinstance(record, Failed):
            raise record
        with arguments.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    report(known())


if __name__ == "__main__":
    main()
