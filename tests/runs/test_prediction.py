"""Raw rows to predictions, of a run and of what was exported of it."""

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_diabetes

from pyro_sparse.runs import deployment, experiment
from pyro_sparse.runs.prediction import as_text, predict
from pyro_sparse.runs.settings import settings_for


@pytest.fixture(scope="module")
def table():
    frame = load_diabetes(scaled=False, as_frame=True).frame[["age", "sex", "bmi", "target"]]
    frame["sex"] = frame["sex"].map({1: "f", 2: "m"})
    return frame


@pytest.fixture(scope="module")
def folders(table, tmp_path_factory):
    """Of a run and of its export."""
    folder = tmp_path_factory.mktemp("runs")
    table.to_csv(folder / "table.csv", index=False)
    settings = settings_for("ss-ig", f"csv:{folder / 'table.csv'}", net="mlp:8", epochs=10)
    dataset = experiment.load_data(settings, None)
    experiment.run(settings, folder / "run", dataset=dataset, progress=False, figures=False)
    deployment.write_export(folder / "run", folder / "small")
    return folder / "run", folder / "small"


@pytest.mark.parametrize("which", [0, 1], ids=["run", "export"])
def test_numbers_with_intervals(folders, which, table):
    found, _ = predict(folders[which], table)
    assert list(found.columns) == ["prediction", "low", "high"]
    assert len(found) == len(table)
    y = table["target"].to_numpy()
    error = np.sqrt(np.mean((found["prediction"] - y) ** 2))
    assert error < 1.1 * y.std()
    inside = (found["low"] < y) & (y < found["high"])
    assert 0.88 < inside.mean() <= 1
    # The order of columns is that of their names.
    again, _ = predict(folders[which], table[["bmi", "sex", "age"]])
    pd.testing.assert_frame_equal(again, found)
    assert as_text(found).startswith("prediction,low,high\n")


def test_what_is_no_table_is_refused(tmp_path):
    settings = settings_for("dense", "diabetes", net="mlp:4", epochs=1)
    dataset = experiment.load_data(settings, None)
    experiment.run(settings, tmp_path / "run", dataset=dataset, progress=False, figures=False)
    with pytest.raises(ValueError, match="expected a network of a table"):
        predict(tmp_path / "run", pd.DataFrame({"age": [1.0], "sex": [1.0]}))
