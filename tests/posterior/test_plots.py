"""Plots draw on the axes they are given and return them."""

import pytest
import torch
from matplotlib.figure import Figure

from pyro_sparse.posterior import plots


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture
def history():
    return [
        {
            "epoch": epoch,
            "elbo_per_datum": -2.0 / epoch,
            "log_likelihood_per_datum": -1.0 / epoch,
            "kept": {"fc1": 9 - epoch, "fc2": 4},
            "expected": {"fc1": 9.3 - epoch, "fc2": 4.0},
        }
        for epoch in range(1, 6)
    ]


def test_training_curve(ax, history):
    assert plots.training_curve(history, ax) is ax
    assert len(ax.lines) == 2
    assert ax.lines[0].get_ydata().tolist() == [-1.0 / epoch for epoch in range(1, 6)]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"log-likelihood", "ELBO"}


def test_training_curve_with_validation(ax, history):
    for entry in history:
        entry["validation_accuracy"] = 0.9
    assert plots.training_curve(history, ax) is ax
    (right,) = [other for other in ax.figure.axes if other is not ax]
    assert right.lines[0].get_ydata().tolist() == [0.9] * 5
    assert len(ax.get_legend().get_texts()) == 3


def test_one_epoch(ax, history):
    plots.training_curve(history[:1], ax)
    low, high = ax.get_ylim()
    assert low < high


def test_inclusion_probabilities(ax):
    inclusion = {"fc1": torch.tensor([0.2, 0.9, 0.6]), "fc2": torch.tensor([0.1])}
    assert plots.inclusion_probabilities(inclusion, ax) is ax
    points = [collection.get_offsets() for collection in ax.collections]
    assert points[0][:, 1].tolist() == pytest.approx([0.9, 0.6, 0.2])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["fc1: 2 of 3", "fc2: 0 of 1"]


def test_units_kept(ax, history):
    assert plots.units_kept(history, ax) is ax
    assert len(ax.lines) == 4
    assert ax.lines[0].get_ydata().tolist() == [8, 7, 6, 5, 4]
    assert ax.lines[1].get_ydata().tolist() == pytest.approx([8.3, 7.3, 6.3, 5.3, 4.3])
    assert ax.get_ylim()[0] == 0


def test_no_global_figure_is_made(ax, history):
    import matplotlib.pyplot as plt

    plots.units_kept(history, ax)
    assert plt.get_fignums() == []
