"""The benchmarks of training measure what they say, and run."""

import importlib
import itertools
import re
import sys
from pathlib import Path

import pyro
import pytest
import torch

from pyro_sparse import infer, nets
from pyro_sparse.modules import own_parameters

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def step():
    return _benchmark("step")


def _benchmark(name):
    """benchmarks/ is no part of the package: it is found from the root of the project only."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"benchmarks.{name}")
    finally:
        sys.path.remove(str(ROOT))


# -- what is measured ------------------------------------------------------------------------------


def test_interleaved_takes_turns(step):
    calls = []
    machine = step.Machine("cpu", quick=True)
    times = step.interleaved(
        machine, {name: lambda name=name: calls.append(name) for name in "ab"}, 3, 2
    )
    assert "".join(calls) == 3 * "aaabbb"  # one that is not timed, and two that are
    assert all(len(found.cpu) == len(found.wall) == 3 for found in times.values())


def test_ratio_and_exponent(step):
    # A machine that slows down by half does so for both.
    assert step.ratio([2.0, 2.0, 4.0], [1.0, 1.0, 2.0]) == 2.0
    sizes = [1, 2, 4, 8]
    assert step.exponent(sizes, [3 * size**1.1 for size in sizes]) == pytest.approx(1.1)
    assert step.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_peak_bytes(step):
    """What lives at once, and no more: each call frees what it made."""
    kept, temporary = 3_000_000, 2_000_000

    def prepare():
        own = torch.zeros(kept // 4)
        return lambda: own.sum() + torch.zeros(temporary // 4).sum()

    peak = step.peak_bytes(step.Machine("cpu", quick=True), prepare)
    assert kept + temporary <= peak <= 1.01 * (kept + temporary)


@pytest.mark.parametrize("name", ["ss-ig", "ss-gl", "ss-ghs", "bc-ghs", "turbo-vbi", "bmr", "sbp"])
def test_without_handlers(step, name):
    """The interpreter without Pyro computes the same loss, so the difference in time is Pyro's."""
    machine = step.Machine("cpu", quick=True)
    x, y = machine.batch(5)
    model, guide = step.build(name, nets.build("mlp:4-3", step.SHAPE, 10), machine)
    torch.manual_seed(0)
    with own_parameters(model, guide):
        expected = infer.ELBO().estimate(model, guide, x, y).loss
    torch.manual_seed(0)
    sample = pyro.sample
    with step.without_handlers(len(x)) as loss:
        found = loss(model, guide, x, y)
    torch.testing.assert_close(found, expected)
    assert pyro.sample is sample


def test_every_row_has_its_bar(step):
    bars = {
        one.label: one.bar(batch)
        for one, batch in itertools.product(
            step.configurations(("ss-ghs", "sbp", "bmr", "dense")), step.BATCHES
        )
    }
    assert bars["ss-ghs tied local"] == bars["sbp batch"] == 1.25
    assert bars["ss-ghs tied weights"] is bars["sbp example"] is None
    assert bars["ss-ghs full weights"] == 1.35
    assert bars["bmr full local"] == 2.3
    assert bars["dense by fit"] is None
    assert "dense" not in bars  # which is the plain torch step, below the line of every ratio


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def small(step, monkeypatch):
    monkeypatch.setattr(step, "MLP", "mlp:4-3")
    monkeypatch.setattr(step, "NETS", {"mlp:4-3": "MLP"})
    monkeypatch.setattr(step, "BATCHES", (2, 3))
    monkeypatch.setattr(step, "WIDTHS", (2, 3, 4))
    monkeypatch.setattr(step, "SIZES", (100, 200))
    whole = step.interleaved
    monkeypatch.setattr(step, "interleaved", lambda machine, calls, *_: whole(machine, calls, 1, 1))
    monkeypatch.delenv("PYRO_SPARSE_DATA", raising=False)


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("steps", ["dense", "naive Pyro", "ss-ghs tied local", "ss-ghs full weights", "sbp batch"]),
        ("overhead", ["ss-ghs", "sbp", "ss-ghs tied"]),
        ("memory", ["dense", "ss-ghs full local"]),
        ("width", ["2", "3", "exponent, all widths"]),
        ("data", ["100", "200", "exponent"]),
        ("gradient", ["tied", "full"]),
    ],
)
def test_part(step, small, capsys, part, rows):
    step.main(["--quick", "--part", part])
    printed = capsys.readouterr().out
    first = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert set(rows) <= set(first)
    assert not re.search(r"\bnan\b|\binf\b", printed)


def test_all_parts_are_tested(step):
    (mark,) = (mark for mark in test_part.pytestmark if mark.name == "parametrize")
    assert {part for part, _ in mark.args[1]} == set(step.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(step, capsys):
    with pytest.raises(SystemExit):
        step.main(["--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_time_to_quality(capsys):
    _benchmark("time_to_quality").main(
        ["ss-ghs:epochs=3,net=mlp:8", "--data", "digits", "--every", "2"]
    )
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert [row[0] for row in table[2:]] == ["2", "3"]  # the last epoch counts
    assert float(table[2][1]) <= float(table[3][1])
    assert all(row[-1].endswith("%") for row in table[2:])
