"""BMR on UCI regression: does the iterated path pay, and what does it cost in accuracy?

One hidden layer of 50 ReLU units, N(0, 1) on weights, Gamma(1, 1) on the noise precision with a
gamma posterior, Adam 1e-2: train, prune every weight with ΔF ≥ 0, train on for a fifth of the
epochs, until a pass prunes nothing (Beckers et al., arXiv 2210.09134). For each split: the free
energy (negative ELBO, nats) unpruned, right after the first pruning (one shot, without and with the
prediction F − ΣΔF), and at the end; the share of weights removed; test NLL of 100 draws before and
after. Also the two rankings of the paper at the same number of weights, one shot::

    python -m benchmarks.reduction_uci yacht energy concrete wine-quality-red --data-root DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch

from pyro_sparse import data, guides, likelihoods, models, nets
from pyro_sparse.infer import fit
from pyro_sparse.infer.schedules import constant, cosine
from pyro_sparse.posterior import Posterior, TopK, importance, pruning

RANKINGS = {
    "SNR": importance.weight_signal,
    "signal + robustness": importance.weight_signal_plus_robustness,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--splits", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "                        unpruned   one shot (predicted)   iterated   removed   NLL → NLL"
    )
    for name in options.sets:
        rows = [one_split(name, split, options) for split in range(options.splits)]
        for split, row in enumerate(rows):
            print(f"{name:18} {split}   {line(row)}", flush=True)
        mean = {key: fmean(row[key] for row in rows) for key in rows[0]}
        print(f"{name:18} mean{line(mean)}")
        for ranking in RANKINGS:
            print(f"{'':18} by {ranking}, same number of weights: NLL {mean[ranking]:.3f}")


def line(row: dict[str, float]) -> str:
    """One row of the table."""
    energies = f"{row['unpruned']:10.1f} {row['one shot']:10.1f} {row['predicted']:10.1f} "
    scores = f"{row['removed']:9.1%} {row['NLL']:9.3f} → {row['NLL reduced']:.3f}"
    return f"{energies}{row['iterated']:12.1f} {scores}"


def one_split(name: str, split: int, options: argparse.Namespace) -> dict[str, float]:
    """Free energies and scores of one split."""
    dataset = data.load(f"uci:{name}", options.data_root, validation=0.0, split=split)
    x, y, test = dataset.train.x, dataset.train.y, dataset.test
    torch.manual_seed(split)
    net = nets.mlp([x.shape[1], 50, 1], activation="relu")
    model = models.ReducibleGaussian(
        net, x[:2], num_data=len(x), likelihood=likelihoods.Normal(shape=1.0, rate=1.0)
    )
    posterior = Posterior(model, guides.for_model(model))
    loader = data.Batches(x, y, 32, seed=split)
    how = {"lr": 1e-2, "scale_lr": 1e-2, "kl_weight": constant(), "schedule": cosine(0.5)}
    fit(model, posterior.guide, loader, epochs=options.epochs, progress=False, **how)  # type: ignore[arg-type]

    scale = float(dataset.preprocessing["target"]["std"])

    def nll() -> float:
        return posterior.evaluate(test.x, test.y, 100, target_scale=scale)["nll_ensemble"]

    row = {"NLL": nll()}
    state = {part: module.state_dict() for part, module in parts(posterior).items()}
    saved = {part: {k: v.clone() for k, v in values.items()} for part, values in state.items()}
    path = pruning.iterate(
        posterior, loader, epochs=max(1, options.epochs // 5), progress=False, **how
    )
    first = path[1] if len(path) > 1 else path[0]
    predicted = first.free_energy if first.predicted is None else first.predicted
    row |= {
        "unpruned": path[0].free_energy,
        "one shot": first.pruned,
        "predicted": predicted,
        "iterated": path[-1].free_energy,
        "removed": 1 - path[-1].left / path[0].left,
        "NLL reduced": nll(),
    }
    for ranking, measure in RANKINGS.items():
        for part, module in parts(posterior).items():
            module.load_state_dict(saved[part])
        posterior.prune(TopK(measure, path[-1].left / path[0].left))
        row[ranking] = nll()
    return row


def parts(posterior: Posterior) -> dict[str, torch.nn.Module]:
    """Model and guide by name."""
    return {"model": posterior.model, "guide": posterior.guide}


if __name__ == "__main__":
    main()
