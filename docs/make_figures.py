"""Draws docs/digits.png from a run folder that `pyro-sparse compare ... --data digits` wrote.

Usage: python docs/make_figures.py RUN_FOLDER
"""

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyro_sparse.posterior import plots
from pyro_sparse.runs import experiment


def main(folder: Path) -> None:
    """Units over epochs, inclusion probabilities, training curve: three panels."""
    _, _, posterior = experiment.load(folder)
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    plots.units_kept(history, left)
    plots.inclusion_probabilities(posterior.inclusion(), middle)
    plots.training_curve(history, right)
    figure.savefig(Path(__file__).parent / "digits.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
