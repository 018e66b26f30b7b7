"""The benchmark measures what it says, and compares outputs first. No test depends on the speed."""

import json
import math
import time

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pyro_sparse.export import bench, latency, load, plots, reference, save
from pyro_sparse.export._load import FormatError
from pyro_sparse.export.latency import ONNX, TORCH, Benchmark, Ratio, Timing
from pyro_sparse.nets import count_macs, count_parameters, lenet5_caffe, mlp


@pytest.fixture(scope="module")
def measured():
    threads = torch.get_num_threads()
    dense, compact = mlp([6, 20, 3]), mlp([6, 5, 3])
    dense.train()
    result = bench(dense, compact, torch.zeros(1, 6), batches=(1, 4, 4), seconds=0.01)
    assert torch.get_num_threads() == threads
    assert dense.training
    return result


def test_every_network_in_every_runtime(measured):
    assert [(row.network, row.runtime, row.batch) for row in measured.timings] == [
        (network, runtime, batch)
        for batch in (1, 4)
        for network, runtime in (
            *(("dense", TORCH), ("compact", TORCH)),
            *(("dense", ONNX), ("compact", ONNX)),
        )
    ]
    for row in measured.timings:
        assert 0 < row.low <= row.median <= row.high
        assert row.throughput == pytest.approx(row.batch / row.median)
        assert row.rounds >= 7
    assert [(row.title, row.batch) for row in measured.ratios] == [
        (title, batch) for batch in (1, 4) for title in (TORCH, ONNX, "torch → ONNX Runtime")
    ]
    for row in measured.ratios:
        assert 0 < row.low <= row.median <= row.high


def test_what_else_is_said(measured):
    assert measured.macs == {"dense": 6 * 20 + 20 * 3, "compact": 6 * 5 + 5 * 3}
    assert measured.mac_ratio == 4
    assert measured.parameters["compact"] == 6 * 5 + 5 + 5 * 3 + 3
    assert measured.threads == 1
    assert measured.versions.keys() == {"torch", ONNX}
    assert measured.cpu
    for difference in measured.runtime_difference.values():
        assert difference["max_abs_diff"] <= 1e-5
    assert json.loads(json.dumps(measured.to_dict()))["mac_ratio"] == 4


def test_times_and_ratios_by_a_clock_of_our_own(monkeypatch):
    """Dense takes 8 s an input, compact 2 s."""
    now = 0.0

    class Sleeper(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            nonlocal now
            now += self.seconds * len(x)
            return self.linear(x)

    # One thread: the process's own time, whatever the clock on the wall says.
    monkeypatch.setattr(time, "process_time", lambda: now)
    monkeypatch.setattr(latency, "onnx_available", lambda: False)
    result = bench(Sleeper(8.0), Sleeper(2.0), torch.zeros(1, 2), batches=(1, 3), seconds=1e-3)
    assert [row.median for row in result.timings] == [8, 2, 24, 6]
    assert [row.throughput for row in result.timings] == [1 / 8, 1 / 2, 1 / 8, 1 / 2]
    assert all(row.rounds >= 7 for row in result.timings)
    assert [(row.title, row.median) for row in result.ratios] == [(TORCH, 4), (TORCH, 4)]
    assert result.versions.keys() == {"torch"}
    assert result.clock == "processor time"
    options = {"batches": (1,), "seconds": 1e-3}
    walls = bench(Sleeper(8.0), Sleeper(2.0), torch.zeros(1, 2), threads=2, **options)
    assert walls.clock == "wall clock"
    assert walls.timings[0].median < 1


def test_order_changes_from_round_to_round():
    calls = []
    runners = {
        (name, TORCH): (lambda x, name=name: calls.append(name) or time.sleep(1e-3))
        for name in "ab"
    }
    times = latency._rounds(runners, torch.zeros(1), 1e-3, time.perf_counter)
    assert len(times["a", TORCH]) == len(times["b", TORCH]) == 7
    # Two calls a turn, one to warm up.
    turns = "".join(calls[-28::2])
    assert {turns[i : i + 2] for i in range(0, 14, 2)} == {"ab", "ba"}


def test_networks_that_differ_in_the_other_runtime(monkeypatch):
    monkeypatch.setattr(
        latency,
        "onnx_runner",
        lambda *given: lambda inputs: {"output": torch.zeros(inputs.batch, 2)},
    )
    with pytest.raises(ValueError, match="ONNX Runtime's dense network differs from torch"):
        bench(mlp([3, 2]), mlp([3, 2]), torch.zeros(1, 3), seconds=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": ()}, "batch sizes of at least 1"),
        ({"batches": (1, 0)}, "batch sizes of at least 1"),
        ({"threads": 0}, "at least one thread"),
        ({"seconds": 0.0}, "positive number of seconds"),
        ({"seconds": math.inf}, "positive number of seconds"),
    ],
)
def test_wrong_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        bench(mlp([3, 2]), mlp([3, 2]), torch.zeros(1, 3), **options)


# -- the dense network of an exported folder -------------------------------------------------------


class WithTensors(nn.Module):
    def __init__(self, units):
        super().__init__()
        self.conv = nn.Conv2d(1, units, 3)
        self.norm = nn.BatchNorm2d(units)
        self.head = nn.Linear(units, 2)
        self.scale = nn.Parameter(torch.randn(units))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)) * self.scale)


@pytest.mark.parametrize(
    ("dense", "small", "shape"),
    [
        (lenet5_caffe(size=16), lenet5_caffe(size=16, widths=(2, 3, 4)), (1, 16, 16)),
        (WithTensors(5).double(), WithTensors(3).double(), (1, 5, 5)),
    ],
)
def test_an_export_says_what_it_was_cut_out_of(dense, small, shape, tmp_path):
    example = torch.randn(2, *shape, dtype=next(dense.parameters()).dtype)
    folder = save(small, tmp_path / "net", dense=dense, example=example)
    again = reference(folder)
    assert not again.training
    assert count_parameters(again) == count_parameters(dense)
    assert count_macs(again, example) == count_macs(dense, example)
    assert again(example).shape == dense(example).shape
    assert again(example).dtype == example.dtype
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in dense.state_dict().items()
    }
    # And nothing else of it: the weights are not in the folder.
    assert count_parameters(load(folder)) == count_parameters(small)


def test_an_export_without_it(tmp_path):
    folder = save(mlp([3, 2]), tmp_path / "net", example=torch.zeros(1, 3))
    with pytest.raises(FormatError, match="does not say which full-size network"):
        reference(folder)


# -- plots -----------------------------------------------------------------------------------------


@pytest.fixture
def benchmark():
    timings = [
        Timing(network, runtime, batch, median, 0.9 * median, 1.2 * median, batch / median, 9)
        for batch in (1, 16)
        for network, runtime, median in (
            *(("dense", TORCH, 8e-3 * batch), ("compact", TORCH, 4e-3 * batch)),
            *(("dense", ONNX, 4e-3 * batch), ("compact", ONNX, 1e-3 * batch)),
        )
    ]
    ratios = [
        Ratio(title, first, second, batch, value, value - 0.5, value + 1)
        for batch in (1, 16)
        for title, first, second, value in (
            *((TORCH, TORCH, TORCH, 2.0), (ONNX, ONNX, ONNX, 4.0)),
            ("torch → ONNX Runtime", TORCH, ONNX, 8.0),
        )
    ]
    return Benchmark(
        tuple(timings),
        tuple(ratios),
        1,
        "processor time",
        "a processor",
        {"torch": "2", ONNX: "1"},
        {"dense": 1000, "compact": 100},
        {"dense": 2000, "compact": 300},
        {},
    )


def test_plot_of_latencies(benchmark):
    ax = Figure().subplots()
    assert plots.latencies(benchmark, ax) is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        *("dense, torch", "dense, ONNX Runtime", "compact, torch", "compact, ONNX Runtime")
    ]
    lines = [container.lines[0] for container in ax.containers]
    assert [
        line.get_ydata() == pytest.approx([y, y])
        for line, y in zip(lines, (8e3, 4e3, 4e3, 1e3), strict=True)
    ] == [True] * 4
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "16"]


def test_plot_of_speed_ups(benchmark):
    ax = Figure().subplots()
    assert plots.speed_ups(benchmark, ax) is ax
    assert [patch.get_height() for patch in ax.patches] == [2, 2, 4, 4, 8, 8]
    assert [text.get_text() for text in ax.texts] == [
        "2.0×",
        "2.0×",
        "4.0×",
        "4.0×",
        "8.0×",
        "8.0×",
    ]
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {TORCH, ONNX, "dense in torch, compact in ONNX Runtime", "MACs: 10.0×"}
    assert ax.get_ylim()[1] > 10
