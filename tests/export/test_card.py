"""The model card: what it shows was given or measured, and what was not is said to be so."""

import json

import pytest
import torch

from pyro_sparse.export import refresh_card, save
from pyro_sparse.nets import mlp

SCORES = {
    "dense": {"accuracy": 0.9871, "nll": 0.0432, "ece": 0.0051},
    "ensemble": {"accuracy": 0.9853, "nll": 0.0512, "ece": 0.0062},
    "compact": {"accuracy": 0.9844, "nll": 0.0613, "ece": 0.0073},
}
BENCH = {
    "timings": [
        {
            "network": network,
            "runtime": "torch",
            "batch": 16,
            "median": m,
            "low": m / 2,
            "high": 2 * m,
        }
        for network, m in (("dense", 8e-3), ("compact", 2e-3))
    ],
    "ratios": [
        {
            **{"title": "torch", "dense_runtime": "torch", "compact_runtime": "torch"},
            **{"batch": 16, "median": 4.0, "low": 3.5, "high": 4.5},
        }
    ],
    "threads": 2,
    "clock": "wall clock",
    "cpu": "a processor",
    "versions": {"torch": "2.0"},
    "macs": {"dense": 1000, "compact": 100},
}


def card(folder, **options):
    save(mlp([4, 3, 2]), folder, **{"example": torch.zeros(1, 4), **options})
    return (folder / "README.md").read_text()


def test_everything_that_is_known(tmp_path):
    text = card(
        tmp_path,
        example=torch.zeros(1, 4),
        dense=mlp([4, 30, 2]),
        preprocessing={
            "inputs": {"divide_by": 255.0, "mean": [0.25], "std": [0.5]},
            "target": {"labels": ["cat", "dog"]},
        },
        metadata={
            **{"model": "ss-gl", "data": "mnist", "net": "mlp:30", "seed": 7, "epochs": 9},
            **{"units": {"fc1": 30}, "kept": {"fc1": 3}, "max_abs_diff_masked_compact": 1.5e-7},
            "scores": SCORES,
        },
    )
    for said in (
        "# mlp:30 on mnist, pruned",
        "A plain torch network of 23 parameters, cut out of a network with 212",
        "| dense network of the same architecture, trained alone | 98.71% | 0.0432 | 0.0051 |",
        "| full-size posterior, average of draws | 98.53% | 0.0512 | 0.0062 |",
        "| this network | 98.44% | 0.0613 | 0.0073 |",
        "| parameters | 212 | 23 | 9.2× |",
        "| MACs for one input | 180 | 18 | 10.0× |",
        "Units kept: fc1 3 of 30.",
        "largest difference 1.5e-07 over test inputs",
        "net(torch.zeros((2, 4), dtype=torch.float32))",
        "Run in this folder; the batch size is free.",
        "Divide by 255, subtract 0.25, divide by 0.5.",
        "softmax over the last axis gives probabilities.",
        "Classes, in order: cat, dog.",
        "- seed: 7",
        "- epochs: 9",
        "Not measured; `pyro-sparse bench FOLDER`",
    ):
        assert said in text, said
    # Only what is there is explained.
    assert "model.onnx" not in text
    assert "int8" not in text.lower()
    assert "\n\n\n" not in text


def test_nothing_is_known(tmp_path):
    text = card(tmp_path)
    assert text.startswith("# Pruned network\n")
    assert "A plain torch network of 23 parameters. Made with" in text
    assert "| parameters | not measured | 23 | not measured |" in text
    assert "| MACs for one input | not measured | 18 | not measured |" in text
    for absent in ("How good", "Units kept", "softmax", "What to do to inputs", "comes from"):
        assert absent not in text


def test_scores_that_are_missing(tmp_path):
    text = card(tmp_path, metadata={"scores": {**SCORES, "dense": None}})
    assert "trained alone | not measured | not measured | not measured |" in text
    assert "| this network | 98.44% |" in text


def test_regression(tmp_path):
    scores = {"ensemble": {"rmse": 53.21, "nll": 5.4}, "compact": {"rmse": 54.32, "nll": 5.5}}
    text = card(
        tmp_path,
        preprocessing={
            "inputs": {"divide_by": 1.0, "mean": [1.0, 2.0], "std": [3.0, 4.0]},
            "target": {"mean": 152.1, "std": 77.0},
        },
        metadata={"scores": scores, "noise_scale": [55.5]},
    )
    assert "|  | RMSE | NLL (nats) |" in text
    assert "| this network | 54.32 | 5.5000 |" in text
    assert "times 77, plus 152.1" in text
    assert "standard deviation of about 55.5" in text
    assert "calibration error" not in text.lower()
    assert "`config.json` has both under `preprocessing.inputs`" in text


def test_latency_is_added_by_bench(tmp_path):
    card(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    refresh_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| 16 | torch | 8 (4–16) | 2 (1–4) | 4.0× (3.5–4.5) |" in text
    assert "2 threads on a processor, wall clock; torch 2.0." in text
    assert "Dense MACs over this network's: 10.0×" in text
    assert "ONNX Runtime: not measured, since it was not installed." in text
    (tmp_path / "bench.json").unlink()
    refresh_card(tmp_path)
    assert "Not measured" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_inputs_of_another_type(tmp_path, dtype):
    net = (
        mlp([4, 2]).double()
        if dtype is torch.float64
        else torch.nn.Sequential(torch.nn.Embedding(5, 2))
    )
    save(net, tmp_path, example=torch.ones(1, 4, dtype=dtype))
    name = str(dtype)
    assert f"torch.zeros((2, 4), dtype={name})" in (tmp_path / "README.md").read_text()
