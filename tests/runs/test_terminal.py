"""Tables fit a terminal."""

import io

import pytest
from rich.console import Console

from pyro_sparse.export.latency import ONNX, TORCH, Benchmark, Ratio, Timing
from pyro_sparse.runs import terminal


@pytest.fixture
def benchmark():
    runtimes = ((TORCH, TORCH), (ONNX, ONNX), (TORCH, ONNX))
    return Benchmark(
        tuple(
            Timing(network, runtime, batch, 12.3456e-3, 11.1e-3, 13.5e-3, 123456.0, 9)
            for batch in (1, 256)
            for network in ("dense", "compact")
            for runtime in (TORCH, ONNX)
        ),
        tuple(
            Ratio(
                first if first == second else f"{first} → {second}",
                first,
                second,
                batch,
                12.5,
                11,
                13,
            )
            for batch in (1, 256)
            for first, second in runtimes
        ),
        1,
        "processor time",
        "a processor",
        {"torch": "2.0", ONNX: "1.0"},
        {"dense": 2_293_000, "compact": 154_720},
        {"dense": 431_080, "compact": 4_156},
        {},
    )


@pytest.mark.parametrize("attached", [True, False])
def test_bench_in_80_columns(benchmark, attached):
    file = io.StringIO()
    terminal.print_bench(benchmark, Console(file=file, width=80, force_terminal=attached))
    lines = file.getvalue().splitlines()
    text = "\n".join(lines)
    assert "…" not in text
    assert "2.29M → 155k MACs (14.8×), 431k → 4.16k parameters" in text
    assert text.count("12.3 ±10%") == 12
    assert text.count("123k") == 12
    assert text.count("torch → ONNX ") == 2
    assert text.count("(11.0-13.0)") == 6
    assert "256" in text
