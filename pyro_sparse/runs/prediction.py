"""From raw rows to predictions with their uncertainty: of a run, or of an exported network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_sparse import export, infer
from pyro_sparse.data import tables
from pyro_sparse.runs import experiment
from pyro_sparse.runs.deployment import is_exported

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

__all__ = ["predict"]

INTERVAL = (0.025, 0.975)
"""Ends of the interval of a regression, as quantiles of the prediction."""
NOISE_DRAWS = 1000
"""Draws of a target, in all, from which quantiles are taken."""


def predict(
    folder: str | Path,
    rows: str | Path | Any,
    *,
    root: str | Path | None = None,
    draws: int = 100,
    trust: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """Predictions for rows of a table as it was before anything was done to it.

    A run predicts by draws of its posterior, an exported folder by the networks in it. Columns are
    found by their names; the target's and others that the network does not know are not read.

    Args:
        folder: a run, or what `export` made of one, of a table.
        rows: a file (Parquet by its suffix, else text), or a frame.
        root: of a run's data.
        draws: of a run's posterior.
        trust: see :func:`pyro_sparse.runs.experiment.load`.

    Returns:
        A frame with a line a row: ``prediction``, and for classes the probability of each,
        ``p(label)``; for numbers ``low`` and ``high``, between which a new target lies with
        probability 0.95. And what there is to say about the rows, a sentence each.

    Raises:
        FileNotFoundError: the folder is neither, or there is no such file.
        ValueError: its data are no table, or the rows have not its columns.
    """
    folder = Path(folder)
    if is_exported(folder):
        config = infer.read_json(folder / "config.json")
        preprocessing = config["preprocessing"] or {}
    else:
        _, dataset, posterior = experiment.load(folder, root, trust=trust)
        preprocessing = dataset.preprocessing
    if not preprocessing.get("columns"):
        raise ValueError(
            f"{folder}: expected a network of a table (--data csv:FILE or parquet:FILE), whose "
            "columns are known by name; give this one tensors instead"
        )
    x, notes = tables.new_rows(_read(rows), preprocessing)
    target = preprocessing["target"]
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        if is_exported(folder):
            outputs = export.load(folder)(x)
            outputs = outputs if config["draws"] else outputs.unsqueeze(0)
            about = config["metadata"] or {}
            temperature = about.get("temperature", 1.0)
            natural = outputs.softmax(-1) if "labels" in target else outputs.flatten(2).squeeze(-1)
            noise = torch.tensor(about.get("noise_scale") or [0.0]) / target.get("std", 1.0)
        else:
            likelihood = posterior.model.likelihood
            temperature = infer.read_json(folder / "summary.json").get("temperature", 1.0)
            drawn = list(posterior.draws(x, draws))
            natural = torch.stack([likelihood.natural(output) for output, _ in drawn])
            noise = torch.stack(
                [one.get("noise_precision", torch.tensor(float("inf"))).rsqrt() for _, one in drawn]
            )
        if "labels" in target:
            return _classes(natural, temperature, target["labels"]), notes
        return _numbers(natural.flatten(1), noise.reshape(-1, 1), target), notes


def _read(rows: Any) -> tables.Raw:
    if not isinstance(rows, (str, Path)):
        return tables.from_frame(rows, fewest=1)
    path = Path(rows).expanduser()
    return tables.read_parquet(path) if path.suffix == ".parquet" else tables.read_csv(path, 1)


def _classes(probabilities: Tensor, temperature: float, labels: list[Any]) -> pd.DataFrame:
    """Of draws ``(draws, N, classes)``: the average, at a temperature."""
    import pandas as pd

    mean = probabilities.double().mean(0).clamp(min=1e-300).log().div(temperature).softmax(-1)
    best = mean.argmax(-1).tolist()
    return pd.DataFrame(
        {
            "prediction": [labels[index] for index in best],
            **{f"p({label})": mean[:, index].numpy() for index, label in enumerate(labels)},
        }
    )


def _numbers(means: Tensor, noise: Tensor, target: dict[str, float]) -> pd.DataFrame:
    """Of means ``(draws, N)`` and standard deviations ``(draws or 1, 1)``, standardised."""
    import pandas as pd

    repeats = -(-NOISE_DRAWS // len(means))
    several = means.repeat(repeats, 1)
    scatter = noise.expand(len(means), 1).repeat(repeats, 1)
    drawn = several + scatter * torch.randn(several.shape)
    ends = torch.quantile(drawn.double(), torch.tensor(INTERVAL, dtype=torch.float64), dim=0)
    whole = torch.cat([means.double().mean(0, keepdim=True), ends]) * target["std"] + target["mean"]
    return pd.DataFrame(whole.T.numpy(), columns=["prediction", "low", "high"])


def as_text(predictions: pd.DataFrame) -> str:
    """CSV, numbers to six digits."""
    text = io.StringIO()
    predictions.to_csv(text, index=False, float_format="%.6g")
    return text.getvalue()
