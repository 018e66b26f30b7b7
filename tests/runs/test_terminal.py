"""Tables fit a terminal."""

import io

import pytest
from rich.console import Console

from pyro_sparse.export.latency import ONNX, TORCH, Benchmark, Ratio, Timing
from pyro_sparse.runs import terminal
from pyro_sparse.runs.table import SECTIONS, tabulate


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


def comparison():
    values = {
        **{"accuracy_ensemble": 0.98765, "accuracy_compact": 0.91234, "nll_ensemble": 0.12345},
        **{"nll_compact": 1.23456, "ece_ensemble": 0.0123, "ece_compact": 0.0456},
        **{"params_compact": 1_234_567, "macs_compact": 9_876_543, "train_seconds": 123.4},
    }
    common = {"net": "mlp:10", "epochs": 2, "kept": {"fc1": 12, "fc2": 9}, "undecided": {"fc1": 0}}
    return tabulate(
        [
            {"entry": entry, "model": entry, "seed": seed, **common}
            | {key: value * (1 + seed / 10) for key, value in values.items()}
            for entry in ("ss-ghs", "dense")
            for seed in range(3)
        ]
    )


@pytest.mark.parametrize("attached", [True, False], ids=["terminal", "piped"])
@pytest.mark.parametrize("width", [80, 60, 40, 30])
def test_no_number_is_cut(width, attached):
    file, table = io.StringIO(), comparison()
    terminal.print_comparison(
        "digits", table, Console(file=file, width=width, force_terminal=attached, color_system=None)
    )
    text = file.getvalue()
    assert "…" not in text
    for section in SECTIONS:
        _, lines = table.section(section, sign="±")
        for cells in lines.values():
            for cell in cells:
                assert cell in text
    if attached:
        assert max(map(len, text.splitlines())) <= width
    # The model stands in every block: a head with its name over both rows.
    heads = [line for line in text.splitlines() if line.strip().startswith("model")]
    rows = [line for line in text.splitlines() if line.strip().startswith(("ss-ghs", "dense"))]
    assert len(rows) >= 2 * len(heads)


def test_names_are_no_markup():
    file = io.StringIO()
    one = {"variable": "age[red]", "probability": 0.987, "error": None, "prior": 0.5}
    terminal.print_result({"inputs": [one]}, Console(file=file, width=40, force_terminal=True))
    assert "age[red]" in file.getvalue()
    assert "0.987" in file.getvalue()
