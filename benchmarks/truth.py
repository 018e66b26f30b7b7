"""Is what the posterior says of the inputs true? One table, against references of this file's own.

Parts (`--part`):

- ``inputs``: 30 independent inputs of which 3 matter, 300 rows, one hidden layer; pure noise; the
  realised false-discovery rate at levels 5, 10 and 20 %, power, the claimed rate.
- ``linear``: linear regressions of 10 and 50 inputs, correlations 0, 0.5 and 0.9, 60 to 200 rows,
  drawn from the model's own prior: inclusion probabilities against enumeration (10) and collapsed
  Gibbs sampling (50), the stated rate, the interval of the number of inputs, and how far each
  diagnostic ranks data sets as the largest error of the guide's probabilities does.

Everything is by defaults of `fit`. A data set is a line of a JSON file, done ones are skipped::

    python -m benchmarks.truth --part linear --sets 20 --out runs/truth.jsonl

Options: ``--report`` prints the table of what is there; ``--estimators`` adds, to the linear part,
every estimator of the inclusions' gradient, by its distance from the optimum of the guide's family.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import pyro_sparse as ps
from pyro_sparse.posterior import Posterior, select_inputs

LEVELS = (0.05, 0.1, 0.2)
PRIOR, SLAB = 0.3, 0.5
ROWS = (60, 100, 200)
CORRELATIONS = (0.0, 0.5, 0.9)
ESTIMATORS = {"trapezium": 1, "straight-through": 1, "score": 8}

# -- references ------------------------------------------------------------------------------------


def regression(seed: int, rows: int, inputs: int, correlation: float) -> tuple[Any, ...]:
    """Inputs, targets with noise 1, and which matter: drawn from the model's own prior."""
    generator = np.random.default_rng(seed)
    shared, own = generator.standard_normal((rows, 1)), generator.standard_normal((rows, inputs))
    x = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    inside = generator.random(inputs) < PRIOR
    effect = SLAB * generator.standard_normal(inputs) * inside
    return x, x @ effect + generator.standard_normal(rows), inside


def log_evidence(gram: np.ndarray, moment: np.ndarray, inside: np.ndarray) -> float:
    """log p(y | support) + log p(support), up to a constant; coefficients integrated out."""
    count, prior = int(inside.sum()), math.log(PRIOR / (1 - PRIOR))
    if not count:
        return 0.0
    precision = np.eye(count) + SLAB**2 * gram[np.ix_(inside, inside)]
    factor = np.linalg.cholesky(precision)
    half = np.linalg.solve(factor, SLAB * moment[inside])
    return float(0.5 * half @ half - np.log(np.diag(factor)).sum() + count * prior)


def enumerated(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact inclusion probabilities, and the law of the number of inputs."""
    gram, moment = x.T @ x, x.T @ y
    supports = np.array(list(itertools.product([False, True], repeat=x.shape[1])))
    logs = np.array([log_evidence(gram, moment, one) for one in supports])
    weight = np.exp(logs - logs.max())
    weight /= weight.sum()
    counts = np.bincount(supports.sum(1), weights=weight, minlength=x.shape[1] + 1)
    return weight @ supports, counts


def sampled(x: np.ndarray, y: np.ndarray, sweeps: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by collapsed Gibbs sampling with exchanges of one input for another.

    Source: George and McCulloch, Statistica Sinica 7 (1997).
    """
    gram, moment, size = x.T @ x, x.T @ y, x.shape[1]
    generator = np.random.default_rng(1)
    state, total, counts = np.zeros(size, bool), np.zeros(size), np.zeros(size + 1)
    now = log_evidence(gram, moment, state)
    for sweep in range(sweeps):
        for i in range(size):
            other = state.copy()
            other[i] = not other[i]
            there = log_evidence(gram, moment, other)
            move = 1 / (1 + math.exp(min(500.0, now - there)))
            if sweep >= sweeps // 10:
                total[i] += move if other[i] else 1 - move
            if generator.random() < move:
                state, now = other, there
        for _ in range(5):
            if state.any() and not state.all():
                other = state.copy()
                other[generator.choice(np.flatnonzero(state))] = False
                other[generator.choice(np.flatnonzero(~state))] = True
                there = log_evidence(gram, moment, other)
                if math.log(generator.random()) < there - now:
                    state, now = other, there
        if sweep >= sweeps // 10:
            counts[int(state.sum())] += 1
    return total / (sweeps - sweeps // 10), counts / counts.sum()


def family_optimum(x: np.ndarray, y: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Where coordinate ascent of the guide's own bound ends: the best inclusions of q(z) q(w | z).

    Source: Carbonetto and Stephens, Bayesian Analysis 7 (2012).
    """
    gram, moment = x.T @ x, x.T @ y
    variance = 1 / (np.diag(gram) + SLAB**-2)
    inside, mean = start.copy(), np.zeros(len(start))
    for _ in range(2000):
        before = inside.copy()
        for i in range(len(start)):
            rest = moment[i] - gram[i] @ (inside * mean) + gram[i, i] * inside[i] * mean[i]
            mean[i] = variance[i] * rest
            odds = math.log(PRIOR / (1 - PRIOR)) + 0.5 * math.log(variance[i] / SLAB**2)
            inside[i] = 1 / (1 + math.exp(-odds - mean[i] ** 2 / (2 * variance[i])))
        if np.abs(inside - before).max() < 1e-7:
            break
    return inside


# -- fits ------------------------------------------------------------------------------------------


def fit_linear(x: Any, y: Any, seed: int, epochs: int, inclusion: str | None = None) -> Posterior:
    """A linear network with gates on its inputs, by the defaults of `fit`."""
    inputs = x.shape[1]
    torch.manual_seed(seed)
    model = ps.models.SpikeSlabGaussian(
        nn.Sequential(nn.Linear(inputs, 1, bias=False)), x[:2],
        likelihood=ps.likelihoods.Normal(1.0), num_data=len(x), output_scale=SLAB,
        prune_inputs=True, input_inclusion_probability=PRIOR,
    )  # fmt: skip
    guide = ps.guides.for_model(model, inclusion=inclusion)
    ps.fit(
        model, guide, ps.data.Batches(x, y, len(x)), epochs=epochs, lr=1e-2, seed=seed,
        num_particles=ESTIMATORS.get(inclusion or "", 1), progress=False,
    )  # fmt: skip
    return Posterior(model, guide)


def linear(seed: int, inputs: int, correlation: float, options: Any) -> dict[str, Any]:
    """One regression: the probabilities that are printed beside the exact ones."""
    x, y, inside = regression(seed, ROWS[seed % len(ROWS)], inputs, correlation)
    exact, law = enumerated(x, y) if inputs <= 12 else sampled(x, y, options.sweeps)
    features, targets = (torch.tensor(value, dtype=torch.float32) for value in (x, y))
    runs = [fit_linear(features, targets, seed + 100 * i, options.epochs) for i in range(2)]
    posterior = runs[0]
    printed, own = (
        value["input"].numpy() for value in (posterior.inclusion(), posterior.guide_inclusion())
    )
    group = posterior.summary().groups[0]
    chosen = select_inputs(posterior.inclusion()["input"], level=0.1)
    mask = chosen.selected.numpy()
    again = runs[1].guide_inclusion()["input"].numpy()
    ratios = ps.posterior.log_weights(
        posterior.model, posterior.guide, features, targets, num_samples=options.draws
    )
    bound = ps.posterior.importance_weighted_elbo
    found = {
        "exact": exact.round(4).tolist(),
        "printed": printed.round(4).tolist(),
        "guide": own.round(4).tolist(),
        "inside": inside.tolist(),
        "mass": float(law[group.low : group.high + 1].sum()),
        "selected": int(mask.sum()),
        "claimed": chosen.false_discovery_rate,
        "rate": float((1 - exact[mask]).mean()) if mask.any() else 0.0,
        # What could rank with the largest error of the guide's own probabilities.
        "error": float(np.abs(own - exact).max()),
        "chain − guide": float(np.abs(printed - own).max()),
        "seeds": float(np.abs(again - own).max()),
        "bounds": bound(ratios, options.draws // 10)[0] - bound(ratios, 1)[0],
        "k-hat": max(-9.0, ps.posterior.pareto_k(ratios)),
    }
    if options.estimators:
        best = family_optimum(x, y, own)
        found["estimators"] = {}
        for name in ESTIMATORS:
            started = time.process_time()
            fitted = fit_linear(features, targets, seed, options.epochs, name)
            away = np.abs(fitted.guide_inclusion()["input"].numpy() - best)
            found["estimators"][name] = [float(away.mean()), time.process_time() - started]
    return found


def inputs(seed: int, kind: str, options: Any) -> dict[str, Any]:
    """One data set of 30 inputs: what is selected at each level."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 30, generator=generator)
    signal = torch.tanh(1.5 * x[:, 0]) + 0.8 * x[:, 1].relu() - 0.6 * x[:, 2]
    noise = torch.randn(300, generator=generator)
    y = noise if kind == "noise" else signal + 0.5 * noise
    y = (y - y.mean()) / y.std()
    torch.manual_seed(seed)
    model = ps.models.SpikeSlabGaussian(
        ps.nets.mlp([30, 50, 1]), x[:2], likelihood=ps.likelihoods.Normal(), num_data=300,
        prune_inputs=True,
    )  # fmt: skip
    guide = ps.guides.for_model(model)
    loader = ps.data.Batches(x, y, 32)
    ps.fit(model, guide, loader, epochs=options.epochs // 5, lr=5e-3, seed=seed, progress=False)
    posterior = Posterior(model, guide)
    found: dict[str, Any] = {
        "printed": [round(p, 4) for p in posterior.inclusion()["input"].tolist()],
        "guide": [round(p, 4) for p in posterior.guide_inclusion()["input"].tolist()],
        "levels": {},
    }
    for level in LEVELS:
        chosen = select_inputs(posterior.inclusion()["input"], level=level)
        true = 0 if kind == "noise" else sum(i < 3 for i in chosen.indices)
        found["levels"][str(level)] = [len(chosen.indices), true, chosen.false_discovery_rate]
    return found


# -- the table -------------------------------------------------------------------------------------


def report(records: list[dict[str, Any]]) -> None:
    """Print what the records say."""
    for kind in ("signal", "noise"):
        runs = [r for r in records if r["part"] == "inputs" and r["kind"] == kind]
        for level in map(str, LEVELS) if runs else ():
            counts = np.array([r["levels"][level] for r in runs])
            selected, true, claimed = counts.T
            realised = float(np.mean((selected - true) / np.maximum(selected, 1)))
            print(
                f"inputs, {kind}, level {level}: {len(runs)} sets, selected {selected.mean():.1f}, "
                f"false-discovery rate {realised:.3f} (claimed {claimed.mean():.3f}), power "
                f"{true.mean() / 3:.2f}, nothing selected in {int((selected == 0).sum())}"
            )
    cases = [r for r in records if r["part"] == "linear"]
    for size, correlation in sorted({(r["inputs"], r["correlation"]) for r in cases}):
        runs = [r for r in cases if (r["inputs"], r["correlation"]) == (size, correlation)]
        exact, printed, own = (
            np.array([r[name] for r in runs]) for name in ("exact", "printed", "guide")
        )
        claimed, rate = (np.mean([r[name] for r in runs]) for name in ("claimed", "rate"))
        print(
            f"linear, p = {size}, ρ = {correlation}: {len(runs)} sets, mean |PIP − exact| "
            f"{np.abs(printed - exact).mean():.3f} (guide's own {np.abs(own - exact).mean():.3f}), "
            f"most {np.abs(printed - exact).max():.2f} ({np.abs(own - exact).max():.2f}); rate "
            f"stated {claimed:.3f}, exact {rate:.3f}; 95 % interval holds "
            f"{np.mean([r['mass'] for r in runs]):.3f}"
        )
    if len(cases) > 5:
        from scipy.stats import spearmanr

        error = [r["error"] for r in cases]
        for name in ("chain − guide", "seeds", "bounds", "k-hat"):
            ranked = spearmanr(error, [r[name] for r in cases]).statistic
            print(f"rank correlation with the guide's largest error: {name} {ranked:.2f}")
    tried = [r["estimators"] for r in cases if r["correlation"] == 0 and "estimators" in r]
    for name in ESTIMATORS if tried else ():
        away, seconds = np.array([t[name] for t in tried]).mean(0)
        print(f"{name}: {away:.4f} from the family's optimum, {seconds:.1f} s of CPU")


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", choices=["inputs", "linear"], default=[])
    parser.add_argument("--sets", type=int, default=10, help="data sets of every kind")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 50], help="linear inputs")
    parser.add_argument("--epochs", type=int, default=1500, help="of a linear fit; networks a 5th")
    parser.add_argument("--sweeps", type=int, default=1000, help="of the reference's sampler")
    parser.add_argument("--draws", type=int, default=200, help="for bounds and k-hat")
    parser.add_argument("--estimators", action="store_true")
    parser.add_argument("--report", action="store_true", help="print the table and fit nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/truth.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = []
    if options.out.is_file():
        known = [json.loads(line) for line in options.out.read_text().splitlines()]
    keys: list[dict[str, Any]] = []
    for seed in range(options.sets):
        if "inputs" in options.part:
            keys += [{"part": "inputs", "kind": kind, "seed": seed} for kind in ("signal", "noise")]
        if "linear" in options.part:
            keys += [
                {"part": "linear", "inputs": size, "correlation": correlation, "seed": seed}
                for size in options.sizes
                for correlation in CORRELATIONS
            ]
    for key in [] if options.report else keys:
        if any(all(r.get(name) == value for name, value in key.items()) for r in known):
            continue
        if key["part"] == "inputs":
            found = inputs(key["seed"], key["kind"], options)
        else:
            found = linear(key["seed"], key["inputs"], key["correlation"], options)
        known.append({**key, **found})
        with options.out.open("a") as file:
            file.write(json.dumps(known[-1]) + "\n")
    report(known)


if __name__ == "__main__":
    main()
