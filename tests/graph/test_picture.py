"""The picture of the groups."""

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyro_sparse.graph import draw, groups
from pyro_sparse.nets import resnet


def test_one_line_a_group_with_its_layers():
    graph = groups(resnet(8, widths=(4, 6, 8)), torch.zeros(2, 3, 8, 8))
    figure = Figure()
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    assert draw(graph, ax) is ax
    figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [f"{group.name} ({group.size})" for group in graph]
    layers = [label.get_text() for label in ax.get_xticklabels()]
    assert layers[:4] == ["input", "conv", "norm", "stage1.0.conv1"]
    assert layers[-1] == "out"
    # The stream's line has a mark for each layer that writes it.
    line = [group.name for group in graph].index("conv")
    marks = [
        tuple(point)
        for collection in ax.collections
        for point in collection.get_offsets().tolist()
        if point[1] == line
    ]
    stream = graph["conv"]
    expected = {part.parameter.rpartition(".")[0] for part in (*stream.writers, *stream.readers)}
    assert {layers[int(x) + 1] for x, _ in marks} == expected
