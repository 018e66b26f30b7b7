"""A trained network is cut down to a budget, and what is wrong with the result is said."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sparse as ps
from pyro_sparse.runs.sparsify import _worse


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:300]), y[:300]).backward()
        optimizer.step()
    loader = DataLoader(TensorDataset(x[:300], y[:300]), batch_size=50, shuffle=True)
    return net.eval(), loader, (x[300:], y[300:])


def test_half_of_the_cost_at_the_same_accuracy(problem, tmp_path):
    net, loader, validation = problem
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ps.sparsify(net, loader, validation=validation, epochs=12, progress=False)
    assert found.macs["compact"] <= 0.5 * found.macs["trained"]
    assert found.scores["compact"]["accuracy"] > found.scores["trained"]["accuracy"] - 0.06
    assert found.net(validation[0]).shape == (100, 2)
    assert found.predict(validation[0]).sum(-1).allclose(torch.ones(100), atol=1e-5)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert not net.training
    folder = found.save(tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "On validation rows." in card
    assert "trained network that this one was cut out of" in card
    assert json.loads((folder / "config.json").read_text())["metadata"]["temperature"] > 0


def test_cautions_are_warnings_and_stand_on_the_card(problem, tmp_path):
    net, loader, _ = problem
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = ps.sparsify(net, loader, epochs=2, budget=0.2, progress=False)
    assert "those of training rows" in found.cautions[-1]
    assert set(found.cautions) <= {str(one.message) for one in told}
    assert found.cautions[-1] in (found.save(tmp_path / "out") / "README.md").read_text()
    assert found.cautions[-1] in str(found)


def test_worse_than_before_is_said():
    scores = {
        "trained": {"accuracy": 0.9, "accuracy_error": 0.01},
        "compact": {"accuracy": 0.8, "accuracy_error": 0.01},
    }
    (said,) = _worse(scores)
    assert "0.8 against 0.9" in said
    assert not _worse({**scores, "compact": {"accuracy": 0.89, "accuracy_error": 0.01}})
    numbers = {
        "trained": {"rmse": 1.0, "rmse_error": 0.1},
        "compact": {"rmse": 2.0, "rmse_error": 0.1},
    }
    assert _worse(numbers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.0}, "below 1"),
        ({"budget": 0.0}, "positive"),
        ({"epochs": 1}, "at least 2"),
        ({"budget": 1e-6}, "one unit a group already costs"),
    ],
)
def test_refused_before_any_training(problem, options, message):
    net, loader, validation = problem
    with pytest.raises(ValueError, match=message):
        ps.sparsify(net, loader, validation=validation, progress=False, **options)


def test_loaders_that_are_none(problem):
    net, _, validation = problem
    with pytest.raises(ValueError, match="empty"):
        ps.sparsify(net, [], validation=validation)
    with pytest.raises(ValueError, match="batches"):
        ps.sparsify(net, [validation[0]], validation=validation)
