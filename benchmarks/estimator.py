"""The scikit-learn estimators with their defaults against regularised linear models, 5-fold.

Real tables: three of scikit-learn's and four of UCI's. Baselines are LogisticRegressionCV and
RidgeCV on standardised columns. Of classes the accuracy and the log loss, of numbers the RMSE in
the target's own unit; differences with their standard error over test rows, paired. ``--validate``
compares settings on validation rows alone (a quarter of the first fold's training rows), which is
how the defaults were chosen; no test row is looked at then::

    python -m benchmarks.estimator --data-root DIR
    python -m benchmarks.estimator --data-root DIR --validate
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pyro_sparse as ps

OWN = {"breast_cancer": load_breast_cancer, "wine": load_wine, "diabetes": load_diabetes}
UCI = ("energy", "yacht", "concrete", "wine-quality-red")
CLASSES = ("breast_cancer", "wine")
CANDIDATES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all inputs": {"prune_inputs": False},
    "ss-ghs": {"model": "ss-ghs"},
    "full variance": {"options": {"variance": "full"}},
}


def table(name: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets."""
    if name in OWN:
        return OWN[name](return_X_y=True)
    folder = root / "uci" / name
    numbers = np.loadtxt(folder / "data.txt")
    inputs = np.loadtxt(folder / "index_features.txt", dtype=int)
    return numbers[:, inputs], numbers[:, int(np.loadtxt(folder / "index_target.txt"))]


def losses(name: str, model: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A column a score, a line a row: mistakes and log loss of classes, or squared errors."""
    if name not in CLASSES:
        return (model.predict(x) - y)[:, None] ** 2
    probabilities = model.predict_proba(x).clip(1e-12)
    wrong = model.classes_[probabilities.argmax(1)] != y
    own = probabilities[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    return np.stack([wrong, -np.log(own)], 1)


def sparse(name: str, **options: Any) -> Any:
    """The estimator for a table."""
    return (ps.SparseBNNClassifier if name in CLASSES else ps.SparseBNNRegressor)(**options)


def linear(name: str) -> Any:
    """The baseline for a table."""
    model = (
        LogisticRegressionCV(
            Cs=10,
            l1_ratios=(0,),
            max_iter=5000,
            scoring="neg_log_loss",
            use_legacy_attributes=False,
        )
        if name in CLASSES
        else RidgeCV(np.logspace(-3, 3, 25))
    )
    return make_pipeline(StandardScaler(), model)


def line(name: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    """Means of both, and the paired difference in standard errors (positive: ours is better)."""
    cells = []
    for column, score in enumerate(("accuracy", "log loss") if name in CLASSES else ("RMSE",)):
        a, b = ours[:, column], theirs[:, column]
        error = (b - a).std(ddof=1) / len(a) ** 0.5
        show = {"accuracy": lambda v: f"{1 - v:.4f}", "RMSE": lambda v: f"{v**0.5:.4f}"}
        shown = [show.get(score, lambda v: f"{v:.4f}")(values.mean()) for values in (a, b)]
        sign = (b - a).mean() / error if error else 0.0
        cells.append(f"{score} {shown[0]} (linear {shown[1]}, {sign:+.1f} s.e.)")
    return "  ".join(cells)


def compare(name: str, root: Path) -> None:
    """Five folds of one table."""
    x, y = table(name, root)
    folds = (StratifiedKFold if name in CLASSES else KFold)(5, shuffle=True, random_state=0)
    ours, theirs, kept, seconds = [], [], [], 0.0
    for train, test in folds.split(x, y):
        start = time.perf_counter()
        model = sparse(name).fit(x[train], y[train])
        ours.append(losses(name, model, x[test], y[test]))
        seconds += time.perf_counter() - start
        kept.append(sum(model.inclusion_ > 0.5))
        theirs.append(losses(name, linear(name).fit(x[train], y[train]), x[test], y[test]))
    print(
        f"{name:17} {line(name, np.concatenate(ours), np.concatenate(theirs))}  "
        f"inputs {min(kept)}-{max(kept)} of {x.shape[1]}  {seconds:.0f} s",
        flush=True,
    )


def validate(name: str, root: Path) -> None:
    """Settings on validation rows of the first fold's training rows."""
    x, y = table(name, root)
    folds = (StratifiedKFold if name in CLASSES else KFold)(5, shuffle=True, random_state=0)
    rows = next(folds.split(x, y))[0]
    train, held = train_test_split(
        rows, random_state=0, stratify=y[rows] if name in CLASSES else None
    )
    baseline = losses(name, linear(name).fit(x[train], y[train]), x[held], y[held])
    for what, options in CANDIDATES.items():
        start = time.perf_counter()
        model = sparse(name, **options).fit(x[train], y[train])
        ours = losses(name, model, x[held], y[held])
        print(
            f"{name:17} {what:14} {line(name, ours, baseline)}  "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", nargs="*", default=[*OWN, *UCI])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--validate", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.tables:
        (validate if options.validate else compare)(name, options.data_root)


if __name__ == "__main__":
    main()
