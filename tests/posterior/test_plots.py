"""Plots draw on the axes they are given and return them."""

import pytest
import torch
from matplotlib.figure import Figure

from pyro_sparse.posterior import MergedInclusion, plots


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


# -- networks, images, seeds -----------------------------------------------------------------------


def test_inclusion_strips(ax):
    inclusion = {"fc1": torch.tensor([0.1, 0.9, 0.5]), "fc2": torch.tensor([1.0, 0.0])}
    assert plots.inclusion_strips(inclusion, ax) is ax
    values = [image.get_array().tolist() for image in ax.images]
    assert values == [[pytest.approx([0.9, 0.5, 0.1])], [[1.0, 0.0]]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["fc1 (3)", "fc2 (2)"]


def test_network_shows_units_and_weights(ax):
    """Two inputs, three units of which one is out, one output."""
    weights = [torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.0, -2.0]]), torch.tensor([[1.0, 0.0, 4.0]])]
    keep = [torch.tensor([True, True]), torch.tensor([True, False, True]), torch.tensor([True])]
    assert plots.network(weights, keep, ax) is ax
    lines, dots = ax.collections[:2], ax.collections[2:]
    # The opacity is the square of the size relative to the layer's largest weight.
    assert sorted(lines[0].get_alpha().tolist()) == pytest.approx([1 / 16, 1 / 4, 1])
    assert sorted(lines[1].get_alpha().tolist()) == pytest.approx([1 / 16, 1])
    assert [len(one.get_offsets()) for one in dots] == [2, 3, 1]
    white = [tuple(face[:3]) == (1, 1, 1) for face in dots[1].get_facecolors().tolist()]
    assert white == [False, True, False]
    assert [text.get_text() for text in ax.texts] == ["2 of 2", "2 of 3", "1 of 1"]
    # A line ends at its units' dots.
    ends = {tuple(point) for segment in lines[0].get_segments() for point in segment.tolist()}
    assert ends <= {tuple(p) for one in dots for p in one.get_offsets().tolist()}


def test_wide_layers_show_their_kept_units(ax):
    keep = [torch.ones(3, dtype=torch.bool), torch.arange(100) >= 95]
    plots.network([torch.ones(100, 3)], keep, ax, most=10)
    assert [text.get_text() for text in ax.texts] == ["3 of 3", "5 of 100\n(10 shown)"]
    (_, units) = ax.collections[1:]
    white = [tuple(face[:3]) == (1, 1, 1) for face in units.get_facecolors().tolist()]
    assert white.count(False) == 5
    # Of those that are all in, those that the next layer reads most.
    first, last = torch.zeros(50, 4), torch.zeros(1, 50)
    last[0, 20:23] = 1.0
    everything = [torch.ones(size, dtype=torch.bool) for size in (4, 50, 1)]
    figure = Figure().subplots()
    plots.network([first, last], everything, figure, most=3)
    lines, *_ = figure.collections  # none between the first two
    assert lines.get_alpha().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"layers of \[3, 100\] units, got shapes \[\(3, 100\)\]"):
        plots.network([torch.ones(3, 100)], keep, ax)


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)])
def test_receptive_fields(ax, shape):
    images = torch.zeros(5, *shape)
    images[3, ..., 0, 1] = -2.0
    images[1, ..., 1, 2] = 0.5
    assert plots.receptive_fields(images, ax, most=2) is ax
    grid = torch.tensor(ax.images[0].get_array().filled(float("nan")))
    # Two images side by side and the gap between them; the larger one first, each up to ±1.
    assert grid.shape == (2, 7)
    assert grid[0, 1] == -1
    assert grid[1, 6] == 1
    assert grid[:, 3].isnan().all()
    assert int(grid.nan_to_num().count_nonzero()) == 2
    assert "2 of 5 shown" in ax.get_title()


def test_inclusion_over_seeds_and_pairs(ax):
    values = torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5]], dtype=torch.float64)
    merged = MergedInclusion({"fc1": values}, ({}, {}))
    assert plots.inclusion_over_seeds(merged, ax) is ax
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.5, 0.5])
    other = Figure().subplots()
    assert plots.co_inclusion(merged, "fc1", other) is other
    pairs = other.images[0].get_array()
    # 0.9 · 0.1 in both runs against ½ · ½; no unit is paired with itself.
    assert pairs[0, 1] == pairs[1, 0] == pytest.approx(0.09 - 0.25)
    assert pairs[0, 2] == pytest.approx(0)
    assert pairs.diagonal().tolist() == [0, 0, 0]
    plots.co_inclusion(merged, "fc1", other, most=2)
    assert other.images[-1].get_array().shape == (2, 2)
