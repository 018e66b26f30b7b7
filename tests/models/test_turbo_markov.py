"""The hierarchy's density, from SciPy's own, and what the model refuses."""

import itertools
import math

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats

from pyro_sparse import models
from pyro_sparse.nets import mlp

DENSITY, PERSISTENCE = 0.3, 0.6
EXAMPLE = torch.zeros(2, 3, dtype=torch.float64)


def make(**options):
    return models.TurboMarkov(mlp([3, 5, 2]).double(), EXAMPLE, num_data=9, **options)


def log_chain(s):
    """λ + κ (s − λ) for the next."""
    total = stats.bernoulli.logpmf(s[0], DENSITY)
    for before, after in itertools.pairwise(s):
        total += stats.bernoulli.logpmf(after, DENSITY + PERSISTENCE * (before - DENSITY))
    return total


@pytest.mark.parametrize(
    ("block_size", "sizes"), [(None, [4]), (2, [2, 2]), (3, [3, 1]), (10, [4])]
)
def test_density(block_size, sizes):
    model = make(
        density=DENSITY, persistence=PERSISTENCE, shape=1.5, norm=2.0, off_shape=4.0, off_norm=0.2,
        output_scale=1.3, block_size=block_size,
    )  # fmt: skip
    s = torch.randint(2, (5, len(sizes))).double()
    rho = torch.rand(5, len(sizes), dtype=torch.float64) + 0.5
    hidden, out = torch.randn(5, 4).double(), torch.randn(2, 6).double()
    whole = block_size is None
    sample = {
        "fc1.support": s[:, 0] if whole else s,
        "fc1.precision": rho[:, 0] if whole else rho,
        "fc1.rows": hidden,
        "out.rows": out,
    }
    trace = poutine.trace(poutine.condition(model.rows, data=sample)).get_trace()
    expected = stats.norm.logpdf(out.numpy(), scale=1.3).sum()
    chains = [s[:, 0]] if whole else s
    expected += sum(log_chain(chain.int().tolist()) for chain in chains)
    for unit in range(5):
        first = 0
        for block, size in enumerate(sizes):
            shape, norm = (1.5, 2.0) if s[unit, block] else (4.0, 0.2)
            a, r = shape * size / 2, rho[unit, block].item()
            # At the mean precision a whole row has a root-mean-square norm of norm.
            b = a * norm**2 / 4
            expected += stats.gamma.logpdf(r, a, scale=1 / b)
            weights = hidden[unit, first : first + size].numpy()
            expected += stats.norm.logpdf(weights, scale=1 / math.sqrt(r)).sum()
            first += size
    assert trace.log_prob_sum().item() == pytest.approx(expected, rel=1e-6)


def test_rows_have_the_norms_of_the_prior():
    model = models.TurboMarkov(
        mlp([200, 300, 2]), torch.zeros(2, 200), num_data=9, density=0.5, off_shape=20.0
    )
    trace = poutine.trace(model.rows).get_trace()
    s, rows = (trace.nodes[f"fc1.{name}"]["value"] for name in ("support", "rows"))
    on, off = (rows[s == value].norm(dim=1).median().item() for value in (1, 0))
    assert on == pytest.approx(float(model.norm), rel=0.1)
    assert off == pytest.approx(float(model.off_norm), rel=0.1)
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, s.numpy(), 0])))[::2].mean()
    assert runs == pytest.approx(1 / ((1 - 0.5) * (1 - 0.5)), rel=0.25)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 1.0}, "density"),
        ({"persistence": 1.0}, "persistence"),
        ({"persistence": -0.1}, "persistence"),
        ({"shape": 0.0}, "shape"),
        ({"norm": 0.1, "off_norm": 0.2}, "off_norm below norm"),
        ({"block_size": 0}, "block_size"),
        ({"prune_inputs": True}, "prune_inputs=False"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)
