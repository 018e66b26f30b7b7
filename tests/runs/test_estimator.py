"""The estimators keep scikit-learn's rules, and say what the posterior says."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.feature_selection import SelectFromModel
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyro_sparse as ps

FAST = {
    "net": "mlp:8",
    "epochs": 40,
    "prune_inputs": False,
    "num_samples": 4,
    "options": {"lr": 0.02},
}
ALL = (ps.SparseBNNClassifier, ps.SparseBNNPoissonRegressor, ps.SparseBNNRegressor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the checks give data on purpose that warn
@parametrize_with_checks([kind(**FAST) for kind in ALL])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def frame(rows=80, seed=0):
    generator = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "size": generator.standard_normal(rows),
            "noise": generator.standard_normal(rows),
            "constant": 1.0,
            "kind": generator.choice(["a", "b", "c"], rows),
        }
    )
    mean = 2 * table["size"] + 3 * (table["kind"] == "b")
    return table, mean + 0.1 * generator.standard_normal(rows)


@pytest.fixture(scope="module")
def fitted():
    table, y = frame()
    return ps.SparseBNNRegressor(net="mlp:8", epochs=100, num_samples=20).fit(table, y)


def test_a_frame_with_names_categories_and_a_constant(fitted):
    table, y = frame()
    assert fitted.score(table, y) > 0.9
    assert list(fitted.inclusion_.index) == ["size", "noise", "constant", "kind"]
    assert fitted.inclusion_["size"] > 0.9
    assert fitted.inclusion_["kind"] > 0.9
    assert fitted.inclusion_["constant"] == 0
    assert fitted.inclusion_["noise"] < 0.5
    support = SelectFromModel(fitted, threshold=0.5, prefit=True).fit(table, y)
    assert support.get_feature_names_out(table.columns).tolist() == ["size", "kind"]


def test_the_compact_network_predicts_as_the_ensemble_does(fitted):
    table, y = frame()
    x, _ = ps.data.tables.new_rows(
        ps.data.tables.from_frame(table, fewest=1), fitted.preprocessing_
    )
    compact = fitted.compact_(x).detach().numpy().ravel()
    target = fitted.preprocessing_["target"]
    prediction, std = fitted.predict(table, return_std=True)
    assert np.abs(compact * target["std"] + target["mean"] - prediction).max() < 0.5
    assert std.shape == prediction.shape
    assert np.isfinite(std).all()
    assert (std > 0).all()
    assert np.mean(np.abs(y - prediction) < 2 * std) > 0.9
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(table), prediction)


def test_rows_of_other_columns_are_refused(fitted):
    table, _ = frame()
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(table[["size", "noise"]])
    with pytest.raises(ValueError, match="'z' did not occur in training"):
        fitted.predict(table.assign(kind="z"))


def test_a_good_guest():
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((30, 3)), generator.integers(0, 2, 30)
    torch.manual_seed(3)
    legacy = np.random.mtrand._rand.get_state
    before = torch.random.get_rng_state(), legacy()[1].copy(), torch.get_default_dtype()
    first, second = (
        ps.SparseBNNClassifier(**FAST, random_state=seed).fit(x, y).predict_proba(x)
        for seed in (1, 1)
    )
    other = ps.SparseBNNClassifier(**FAST, random_state=2).fit(x, y).predict_proba(x)
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    np.testing.assert_array_equal(legacy()[1], before[1])
    assert torch.get_default_dtype() == before[2]


def test_pipelines_and_cross_validation():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((60, 3))
    model = make_pipeline(StandardScaler(), ps.SparseBNNClassifier(**FAST))
    labels = np.array(["no", "yes"])[(x[:, 0] > 0).astype(int)]
    assert cross_val_score(model, x, labels, cv=3).mean() > 0.8


def test_targets_of_any_size():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((60, 2))
    y = 1e8 * (1 + x[:, 0])
    assert ps.SparseBNNRegressor(**{**FAST, "epochs": 60}).fit(x, y).score(x, y) > 0.9
    same = ps.SparseBNNRegressor(**FAST).fit(x, np.full(60, 1e8)).predict(x)
    np.testing.assert_allclose(same, 1e8)
    counts = generator.poisson(1e4 * np.exp(0.5 * x[:, 0]))
    poisson = ps.SparseBNNPoissonRegressor(**{**FAST, "epochs": 60}).fit(x, counts)
    assert poisson.score(x, counts) > 0.9
    mean, std = poisson.predict(x, return_std=True)
    assert (std >= np.sqrt(mean) * (1 - 1e-9)).all()


def test_training_ends_in_time():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((40, 3))
    model = ps.SparseBNNRegressor(net="mlp:4", epochs=10**6, max_seconds=1, num_samples=5)
    assert model.fit(x, x[:, 0]).inclusion_["x0"] >= 0


def test_what_cannot_be_done_is_refused():
    x = np.zeros((10, 2)) + np.arange(10)[:, None]
    with pytest.raises(ValueError, match="one class, 1"):
        ps.SparseBNNClassifier(**FAST).fit(x, np.ones(10, int))
    with pytest.raises(ValueError, match="0 or more, got -1"):
        ps.SparseBNNPoissonRegressor(**FAST).fit(x, np.arange(10) - 1.0)
    with pytest.raises(ValueError, match="num_samples"):
        ps.SparseBNNRegressor(num_samples=0).fit(x, x[:, 0])
    with pytest.raises(AttributeError, match="selects inputs"):
        _ = ps.SparseBNNRegressor(**FAST).fit(x, x[:, 0]).inclusion_
