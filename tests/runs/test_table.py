"""Means, errors and tests over seeds."""

import math
import statistics

import pytest
from scipy.stats import ttest_rel

from pyro_sparse.runs.table import COLUMNS, SECTIONS, Cell, holm, tabulate

SCORES = {
    "a": [0.90, 0.91, 0.93, 0.92],
    "b": [0.91, 0.92, 0.95, 0.94],
    "c": [0.80, 0.81, 0.82, 0.85],
    "d": [0.90, 0.91, 0.93, 0.92],
}


def run(entry, seed, **values):
    return {
        **{"entry": entry, "model": "ss-ig", "seed": seed, "net": "mlp:8", "epochs": 2},
        **{"kept": {"fc1": 4 + seed, "fc2": 3}, "undecided": {"fc1": 0, "fc2": 1}},
        **values,
    }


@pytest.fixture
def runs():
    return [
        run(entry, seed, accuracy_compact=score, macs_compact=100 + ord(entry))
        for entry, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]


def test_every_column_has_one_section():
    shown = [key for section in SECTIONS for key in section.keys]
    assert len(shown) == len(set(shown))
    assert set(shown) == {column.key for column in COLUMNS} | {"kept", "undecided"}


def test_means_and_standard_errors(runs):
    table = tabulate(runs)
    for entry, scores in SCORES.items():
        cell = table.rows[entry]["accuracy_compact"]
        assert cell.mean == pytest.approx(statistics.mean(scores))
        assert cell.standard_error == pytest.approx(statistics.stdev(scores) / 2)
    assert table.layers["kept"]["a"] == "5.5-3"
    assert table.subtitle == "mlp:8, 2 epochs, seeds 0, 1, 2, 3"
    assert [column.key for column in table.columns] == ["accuracy_compact", "macs_compact"]
    assert table.rows["a"]["accuracy_compact"].text("{:.1%}") == "91.5% ± 0.6"
    assert table.rows["a"]["macs_compact"].text("{:.0f}") == "197"


def test_tests_are_paired_and_adjusted(runs):
    table = tabulate(runs, "a")
    raw = {
        entry: ttest_rel(SCORES[entry], SCORES["a"]).pvalue for entry in ("b", "c")
    }  # d never differs
    found = {entry: table.rows[entry]["accuracy_compact"].p_value for entry in SCORES}
    first, second = sorted(raw, key=raw.get)
    assert found[first] == pytest.approx(2 * raw[first])
    assert found[second] == pytest.approx(max(raw[second], 2 * raw[first]))
    assert found["a"] is found["d"] is None
    # Pairing matters: b is better in every seed, by less than seeds differ among themselves.
    assert found["b"] < 0.05
    assert table.section(SECTIONS[0])[1]["b"] == ["93.00% ± 0.91*"]
    assert "differs from a" in table.footnote
    # What never varies has no test.
    assert all(table.rows[entry]["macs_compact"].p_value is None for entry in SCORES)


def test_seeds_are_paired_by_their_number(runs):
    """Whatever the order of the runs, and only where both have them."""
    table = tabulate([one for one in runs[::-1] if (one["entry"], one["seed"]) != ("a", 0)], "a")
    p = ttest_rel(SCORES["c"][1:], SCORES["a"][1:]).pvalue
    assert table.rows["c"]["accuracy_compact"].p_value >= p
    assert table.seeds["a"] == [3, 2, 1]
    assert tabulate(runs[:2]).rows["a"]["accuracy_compact"].p_value is None


def test_empty_cells(runs):
    del runs[0]["accuracy_compact"]
    runs[1]["accuracy_compact"] = math.inf
    table = tabulate([runs[0], runs[1], runs[4]])
    assert table.section(SECTIONS[0])[1] == {"a": ["–"], "b": ["91.00%"]}


def test_unknown_baseline(runs):
    with pytest.raises(ValueError, match="expected a baseline among a, b, c, d, got 'e'"):
        tabulate(runs, "e")


def test_holm():
    # The example of Holm's procedure by hand: 3 · 0.01, max(·, 2 · 0.02), max(·, 0.04).
    found = holm({"x": 0.04, "y": 0.01, "z": 0.02})
    assert found == pytest.approx({"y": 0.03, "z": 0.04, "x": 0.04})
    assert holm({"x": 0.7, "y": 0.6}) == pytest.approx({"x": 1.0, "y": 1.0})
    assert holm({}) == {}


def test_stars():
    assert Cell(1.0, 0.5, 0.01).text("{:.1f}", "±") == "1.0±0.5*"
    assert Cell(1.0, 0.5, 0.06).text("{:.1f}", "±") == "1.0±0.5"
    assert Cell(1.0).text("{:.1f}") == "1.0"
