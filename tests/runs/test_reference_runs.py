"""Runs of the noise, reduction and compression models, and of the pruners to compare with."""

import json

import pytest
import torch

from pyro_sparse import export
from pyro_sparse.runs import deployment, experiment
from pyro_sparse.runs.experiment import settings_for

pytestmark = pytest.mark.usefixtures("blank_pictures")

TINY = {"net": "mlp:8", "epochs": 2}


# -- settings --------------------------------------------------------------------------------------


def test_defaults_by_model():
    """The paper's bound from the first step on, and further rates, where a model asks for it."""
    for model in ("sbp", "bmrs", "bmr"):
        settings = settings_for(model, "digits")
        assert (settings.kl_start, settings.kl_hold, settings.kl_rise) == (1.0, 0.0, 0.0)
    assert settings_for("ss-ghs", "digits").kl_start is None
    assert settings_for("bmrs", "digits").rule == "bmrs-n"
    assert settings_for("sbp", "digits").rule is None
    bmr = settings_for("bmr", "digits")
    assert (bmr.passes, bmr.guide_options["initial_scale"]) == (30, 0.1)
    for model in ("magnitude", "random", "shapley"):
        assert settings_for(model, "digits").passes == 1
    assert settings_for("dense", "digits").passes == 0
    # What is given counts, over the data's and the model's defaults.
    assert settings_for("sbp", "digits", kl_start=0.5, passes=3).kl_start == 0.5
    assert settings_for("bmrs", "digits", rule="snr").rule == "snr"


def test_options_that_a_model_does_not_take():
    """Left out where several models share a command line, refused where one is meant."""
    assert "variance" not in settings_for("sbp", "digits", variance="full").guide_options
    assert "prune_inputs" not in settings_for("bmr", "digits", prune_inputs=True).model_options
    with pytest.raises(ValueError, match=r"sbp has no option variance; it takes .*noise_draws"):
        settings_for("sbp", "digits", strict=True, variance="full")
    with pytest.raises(ValueError, match="bmr has no option prune_inputs"):
        settings_for("bmr", "digits", strict=True, prune_inputs=True)
    with pytest.raises(
        ValueError, match="dense has no option slab_scale; it takes output, prior_scale"
    ):
        settings_for("dense", "digits", strict=True, slab_scale=2.0)
    with pytest.raises(ValueError, match=r"unknown option 'varience'\. Did you mean variance"):
        settings_for("ss-ig", "digits", varience="full")
    # What is taken passes, what all take does, too.
    strict = settings_for(
        "sbp", "digits", strict=True, noise_draws="example", prune_inputs=True, lr=0.1
    )
    assert strict.guide_options["noise_draws"] == "example"
    assert (strict.model_options["prune_inputs"], strict.lr) == (True, 0.1)


# -- runs ------------------------------------------------------------------------------------------

RUNS = {
    "sbp": {"prune_inputs": True, "noise_draws": "example"},
    "bmrs": {"prune_every": 1},
    "bmr": {"passes": 2, "last_layer": "joint"},
    "turbo-vbi": {"epochs": 12, "lr": 2e-2},
    "magnitude": {"budget": 0.5},
    "random": {"budget": 0.5},
    "shapley": {"budget": 0.5},
    "bc-gnj": {},
    "bc-ghs": {"prune_inputs": True},
}


@pytest.mark.parametrize("model", RUNS)
def test_run_load_export(model, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "SCORED", 50)  # the Shapley value on few examples
    folder = tmp_path / model
    settings = settings_for(model, "digits", strict=True, **{**TINY, **RUNS[model]})
    made = experiment.run(settings, folder, dataset=digits, progress=False)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == json.loads(json.dumps(made))
    assert summary["model"] == model
    assert set(summary) >= {
        *("net", "data", "seed", "epochs", "undecided", "train_seconds", "seconds_per_epoch"),
        *(
            f"{score}_{of}"
            for score in ("accuracy", "nll", "ece")
            for of in ("ensemble", "compact")
        ),
    }
    assert set(summary["kept"]) == set(summary["units"])
    assert all(summary["kept"][name] <= units for name, units in summary["units"].items())
    assert summary["macs_compact"] <= summary["macs_dense"] == 64 * 8 + 8 * 10
    assert summary["max_abs_diff_masked_compact"] <= 1e-5
    figures = {path.stem for path in (folder / "figures").iterdir()}
    assert "training" in figures
    assert ("noise" in figures) == (model in ("sbp", "bmrs"))
    assert ("inclusion" in figures) == (model == "turbo-vbi")
    passes = model in ("bmr", "magnitude", "random", "shapley")
    assert ("free_energy" in figures) == ("path" in summary) == passes
    if model == "bmr":
        assert len(summary["path"]) >= 2
        assert summary["path"][0]["number"] == 0
        assert summary["weights_left"]["fc1"] < 8 * 65
        assert summary["path"][-1]["left"] == sum(summary["weights_left"].values())
    if model in ("magnitude", "random", "shapley"):
        assert summary["macs_compact"] <= 0.5 * summary["macs_dense"]
        assert summary["kept"] == {"fc1": 4}
    # The folder gives the same networks back.
    _, dataset, posterior = experiment.load(folder)
    x = dataset.test.x[:20]
    rule = None
    if settings.rule:
        rule = experiment.selection_rule(settings, posterior, dataset.train)
    keep = posterior.keep(rule)
    assert {name: int(keep[name].sum()) for name in summary["kept"]} == summary["kept"]
    exported = deployment.write_export(folder, tmp_path / "export")
    assert {name: exported["kept"][name] for name in summary["kept"]} == summary["kept"]
    assert exported["macs"] == summary["macs_compact"]
    with torch.no_grad():
        output = export.load(tmp_path / "export")(x)
    torch.testing.assert_close(output, posterior.masked(x, keep), rtol=1e-4, atol=1e-5)
