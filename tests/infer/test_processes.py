"""Training in two processes is training in one: the same gradient, and one result."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pyro_sparse.infer import make_fabric

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes of two_processes.py have left."""
    out = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def both(folder, name):
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    return first, second


def test_the_same_gradients_as_one_process(folder):
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    guide, run = module.fit_dense()
    before = module.dense()[1].state_dict()
    first, second = both(folder, "dense")
    losses = torch.tensor([entry["loss"] for entry in run.history], dtype=torch.float64)
    torch.testing.assert_close(first.pop("loss"), losses, rtol=1e-6, atol=0)
    for name, value in guide.named_parameters():
        assert float((value.detach() - before[name]).abs().max()) > 0.01
        torch.testing.assert_close(first[name], value.detach(), rtol=0, atol=1e-6)
        assert torch.equal(first[name], second[name])


def test_both_end_alike_bit_for_bit(folder):
    first, second = both(folder, "sparse")
    assert any(name.endswith("running_mean") for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    noise, other = both(folder, "noise")
    assert not (noise["noise"] == other["noise"]).any()


def test_one_writes(folder):
    lines = (folder / "sparse" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_stopped_together_and_resumed_bit_for_bit(folder):
    whole = both(folder, "sparse")
    resumed = both(folder, "resumed")
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_errors_of_the_first_are_everyones(folder):
    for rank in range(2):
        assert (folder / f"error-{rank}.txt").read_text() == "only the first process knows"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "8-bit"}, "precision of 32-true, bf16-mixed"),
        ({"devices": 0}, "at least one device"),
        ({"accelerator": "abacus"}, "accelerator='abacus'"),
        ({"strategy": "luck"}, "strategy='luck'"),
    ],
)
def test_what_cannot_be_had(options, message):
    with pytest.raises(ValueError, match=message):
        make_fabric(**options)


def test_fabric_loads_no_metrics_for_the_number_of_their_version():
    script = """
import sys
from pyro_sparse.infer import make_fabric
make_fabric()
print("torchmetrics" in sys.modules)
from lightning_fabric.utilities.imports import _TORCHMETRICS_GREATER_EQUAL_1_0_0
print(_TORCHMETRICS_GREATER_EQUAL_1_0_0)
from torchmetrics import Metric
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert done.returncode == 0, done.stderr
