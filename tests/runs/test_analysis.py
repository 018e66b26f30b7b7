"""The analysis of a run folder: calibration, certainty about units, other sizes."""

import json

import pytest
import torch

from pyro_sparse import data, guides, models
from pyro_sparse.nets import mlp
from pyro_sparse.posterior import Posterior, merge, metrics
from pyro_sparse.runs import analysis, experiment
from pyro_sparse.runs.settings import settings_for

TINY = {"net": "mlp:8", "epochs": 2, "inclusion_lr": 1e-4}


def run_of(folder, model, name, **options):
    settings = settings_for(model, name, **{**TINY, **options})
    dataset = experiment.load_data(settings, None)
    experiment.run(settings, folder, dataset=dataset, progress=False, figures=False)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "digits", "ss-ig", "digits")


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "diabetes"
    return run_of(folder, "ss-ghs", "diabetes", prune_inputs=True)


def test_of_classes(digits):
    before = json.loads((digits / "summary.json").read_text())
    found = analysis.analyse(digits, draws=5, members=3)
    assert json.loads((digits / "analysis.json").read_text()) == found
    # The compact network does not depend on draws: the run's own scores come out again.
    for key in ("accuracy_compact", "nll_compact", "ece_compact"):
        assert found["scores"][key] == pytest.approx(before[key], rel=1e-5)
    calibration = found["calibration"]
    assert {name: one["draws"] for name, one in calibration.items()} == {
        **{"ensemble": 5, "compact": 1, "members": 3}
    }
    _, dataset, posterior = experiment.load(digits)
    one = posterior.masked(dataset.test.x).softmax(-1)
    brier = metrics.brier_score(one, dataset.test.y)
    assert calibration["compact"]["brier"] == pytest.approx(brier, rel=1e-5)
    assert calibration["members"]["mutual_information"] > 0
    (group,) = found["groups"]
    assert group["kept"] == before["kept"]["fc1"]
    assert found["measure"] == "inclusion probability"
    (own,) = [point for point in found["curve"] if point["own"]]
    assert own["kept"] == before["kept"]
    assert own["params"] == before["params_compact"]
    assert own["accuracy"] == pytest.approx(before["accuracy_compact"])
    for name in ("calibration", "size"):
        assert (digits / "figures" / f"{name}.png").read_bytes()[1:4] == b"PNG"
    page = (digits / "report.html").read_text()
    assert "How far to believe it" in page
    assert page.count("data:image/png") == 2


def test_of_numbers(diabetes):
    found = analysis.analyse(diabetes, draws=20, members=3)
    assert found["score"] == "rmse"
    for one in found["calibration"].values():
        assert 0.8 < one["coverage_95"] <= 1
        assert one["coverage_50"] < one["coverage_80"] < one["coverage_95"]
        # In the target's unit, whose standard deviation is 77.
        assert 20 < one["crps"] < 80
        assert 150 < one["width_95"] < 600
    assert {group["group"] for group in found["groups"]} == {"input", "fc1"}
    assert "RMSE" in (diabetes / "report.html").read_text()


def test_the_size_curve_is_that_of_the_compact_networks():
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.randint(3, (60,))
    model = models.SpikeSlabGaussian(mlp([4, 10, 6, 3]), x[:2], num_data=60)
    posterior = Posterior(model, guides.for_model(model))
    with torch.no_grad():
        for logits in posterior.guide.inclusion_logits().values():
            logits.normal_(0, 2)
    split = data.dataset.Split(x, y)
    title, measure = analysis.unit_measure(posterior)
    assert title == "inclusion probability"
    own = posterior.keep()
    curve = analysis.size_curve(posterior, split, measure, own, shares=(1.0, 0.5, 0.5, 0.1))
    macs = [point["macs"] for point in curve]
    assert macs == sorted(macs, reverse=True)
    assert curve[0]["kept"] == {"fc1": 10, "fc2": 6}
    assert curve[0]["macs"] == 4 * 10 + 10 * 6 + 6 * 3
    # The share of ½ appears once; 8 of the 16 units are kept, or one more for a layer's best.
    assert [point["own"] for point in curve].count(True) == 1
    assert len(curve) == 4
    for point in curve:
        fc1, fc2 = point["kept"].values()
        assert point["macs"] == 4 * fc1 + fc1 * fc2 + fc2 * 3
        assert point["params"] == point["macs"] + fc1 + fc2 + 3
        if point["own"]:
            right = posterior.masked(x, own).argmax(-1) == y
            assert point["accuracy"] == pytest.approx(float(right.double().mean()))
            assert point["kept"] == {name: int(own[name].sum()) for name in ("fc1", "fc2")}


@pytest.mark.parametrize(
    ("model", "title"),
    [
        ("LogNormalNoise", "signal-to-noise ratio of the noise"),
        ("GroupNormalJeffreys", "retention (−log α)"),
        ("GroupHorseshoe", "scale of the unit"),
        ("ReducibleGaussian", "norm of the weights at posterior means"),
        ("Deterministic", "norm of the weights at posterior means"),
    ],
)
def test_measure_of_every_kind(model, title):
    x = torch.randn(2, 3)
    made = getattr(models, model)(mlp([3, 5, 2]), x, num_data=9)
    posterior = Posterior(made, guides.for_model(made))
    found, measure = analysis.unit_measure(posterior)
    assert found == title
    assert {name: len(values) for name, values in measure(posterior).items()} == {"fc1": 5}


def test_inputs_of_another_data_set(digits):
    """They are scaled as the run's own are: the same rows come out, and cannot be told apart."""
    settings, dataset, _ = experiment.load(digits)
    inputs = analysis._inputs(settings, "digits", None, dataset)
    assert torch.allclose(inputs, dataset.test.x, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected inputs of shape .* got \(10,\) from diabetes"):
        analysis.analyse(digits, outside="diabetes")
    found = analysis.analyse(digits, draws=3, members=1, outside="digits")
    assert found["outside"] == {
        "data": "digits",
        "auroc_entropy": pytest.approx(0.5, abs=1e-3),
        "auroc_mutual_information": pytest.approx(0.5, abs=1e-3),
    }
    assert "told from the test set" in (digits / "report.html").read_text()


def test_what_is_no_finished_run(tmp_path, digits):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        analysis.analyse(tmp_path)
    summary = digits / "summary.json"
    aside = summary.rename(digits / "aside.json")
    with pytest.raises(FileNotFoundError, match="no finished run"):
        analysis.analyse(digits)
    aside.rename(summary)


# -- several seeds ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    out = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1, 10):
        run_of(out / f"seed-{seed}", "ss-ghs", "diabetes", prune_inputs=True, seed=seed)
    return out


def test_runs_of_several_seeds(seeds):
    folders = analysis.seed_folders([seeds])
    assert [path.name for path in folders] == ["seed-0", "seed-1", "seed-10"]
    assert analysis.seed_folders(folders) == folders
    found = analysis.analyse_seeds(folders, seeds, draws=3)
    assert json.loads((seeds / "seeds.json").read_text()) == found
    assert [run["seed"] for run in found["runs"]] == [0, 1, 10]
    # The means are those of the runs' own summaries, the groups those of `merge`.
    own = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    mean = sum(one["rmse_ensemble"] for one in own) / 3
    assert found["scores"]["rmse_ensemble"]["mean"] == pytest.approx(mean)
    merged = merge([experiment.load(folder)[2] for folder in folders])
    assert [group["group"] for group in found["groups"]] == ["input", "fc1"]
    for group in found["groups"]:
        name = group["group"]
        assert group["probability"] == pytest.approx(merged.mean[name].tolist())
        assert group["error"] == pytest.approx(merged.standard_error[name].tolist())
        assert group["always"] + group["sometimes"] <= group["units"]
        first, second, apart = group["pair"]
        independent = merged.mean[name][first] * merged.mean[name][second]
        pair = merged.co_inclusion(name)[first, second] - independent
        assert apart == pytest.approx(float(pair))
    assert len(found["inputs"]["selected"]) <= 10
    # A mixture cannot be worse than its members are on average, up to the noise of the draws.
    assert found["mixture"]["rmse"] < 1.1 * mean
    for name in ("inclusion_over_seeds", "co_inclusion"):
        assert (seeds / "figures" / f"{name}.png").read_bytes()[1:4] == b"PNG"


def test_of_runs_that_do_not_belong_together(seeds, diabetes, digits, tmp_path):
    first, *_ = analysis.seed_folders([seeds])
    with pytest.raises(ValueError, match="at least two runs to merge, got 1"):
        analysis.analyse_seeds([first], tmp_path)
    with pytest.raises(ValueError, match=r"differ in their seeds only, but .* differ in model"):
        analysis.analyse_seeds([first, digits], tmp_path)
    with pytest.raises(ValueError, match=r"different seeds, got the seeds \[0, 0\]"):
        analysis.analyse_seeds([first, diabetes], tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        analysis.analyse_seeds([first, tmp_path], tmp_path)
    assert not (tmp_path / "seeds.json").exists()
