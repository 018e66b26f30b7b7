"""From a run folder to an exported one, which says how good each network is."""

import json

import pytest

from pyro_sparse import data, export
from pyro_sparse.infer import read_json as read
from pyro_sparse.runs import experiment
from pyro_sparse.runs.deployment import write_export
from pyro_sparse.runs.experiment import settings_for

TINY = {"net": "mlp:8", "epochs": 2, "inclusion_lr": 1e-4}
SCORED = ("ensemble", "compact")


def test_export(folder, digits, tmp_path):
    done = write_export(folder, tmp_path / "small")
    assert done["model"] == "ss-ghs"
    assert done["kept"] == {"input": 64, "fc1": 8, "out": 10}
    assert done["parameters"] == read(folder / "summary.json")["params_compact"]
    net = export.load(tmp_path / "small")
    _, _, posterior = experiment.load(folder)
    assert (net(digits.test.x) - posterior.masked(digits.test.x)).abs().max() <= 1e-5
    config = read(tmp_path / "small" / "config.json")
    assert config["preprocessing"]["inputs"].keys() >= {"divide_by", "mean", "std"}


def test_export_says_how_good_each_network_is(folder, tmp_path):
    done = write_export(folder, tmp_path / "small", draws=4)
    assert (tmp_path / "small" / "model.pt2").is_file()
    summary = read(folder / "summary.json")
    scores = read(tmp_path / "small" / "config.json")["metadata"]["scores"]
    assert scores == done["scores"]
    # No baseline at hand; the others as the run itself has measured them.
    assert scores["dense"] is None
    for which in SCORED:
        assert scores[which] == pytest.approx(
            {key: summary[f"{key}_{which}"] for key in ("accuracy", "nll", "ece")}
        )
    _, dataset, _ = experiment.load(folder)
    # A run that could not be pruned has no summary, but may be exported by another threshold.
    (folder / "summary.json").rename(folder / "aside.json")
    again = write_export(folder, tmp_path / "again")
    (folder / "aside.json").rename(folder / "summary.json")
    assert again["scores"]["ensemble"] == pytest.approx(scores["ensemble"])
    outputs = export.load(tmp_path / "small")(dataset.test.x)
    assert outputs.shape == (4, len(dataset.test), 10)
    tested = read(tmp_path / "small" / "config.json")["test"]
    assert tested["rows"] == len(dataset.test)
    right = (outputs.softmax(-1).mean(0).argmax(-1) == dataset.test.y).double().mean()
    assert scores["exported"]["accuracy"] == pytest.approx(float(right))
    assert tested["scores"]["pt2"]["accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize("name", ["ss-ig", "sbp"])
def test_export_of_a_regression_knows_the_noise(name, tmp_path):
    diabetes = data.load("diabetes", validation=0.05)
    settings = settings_for(name, "diabetes", net="mlp:4", epochs=2)
    experiment.run(settings, tmp_path / "run", dataset=diabetes, progress=False, figures=False)
    one = write_export(tmp_path / "run", tmp_path / "one")
    std = diabetes.preprocessing["target"]["std"]
    (noise,) = one["noise_scale"]
    assert 0.3 * std < noise < 3 * std
    summary = read(tmp_path / "run" / "summary.json")
    for which in SCORED:
        for key in ("rmse", "nll"):
            # The run averages the draws of the noise, which have a law that is known.
            expected = pytest.approx(summary[f"{key}_{which}"], rel=1e-2)
            assert one["scores"][which][key] == expected
    write_export(tmp_path / "run", tmp_path / "several", draws=5)
    about = read(tmp_path / "several" / "config.json")["metadata"]
    assert len(about["noise_scale"]) == 5
    assert sum(about["noise_scale"]) / 5 == pytest.approx(noise, rel=0.2)
    assert about["scores"]["exported"].keys() == {"rmse", "nll"}


def test_export_finds_the_dense_baseline(digits, tmp_path):
    runs = tmp_path / "runs"
    for name in ("ss-ig", "dense"):
        settings = settings_for(name, "digits", **TINY)
        experiment.run(settings, runs / name, dataset=digits, progress=False, figures=False)
    summary = read(runs / "dense" / "summary.json")
    expected = {key: summary[f"{key}_compact"] for key in ("accuracy", "nll", "ece")}
    beside = write_export(runs / "ss-ig", tmp_path / "beside")
    assert beside["scores"]["dense"] == expected
    # Elsewhere it has to be named.
    (runs / "dense").rename(runs / "baseline")
    alone = write_export(runs / "ss-ig", tmp_path / "alone")
    assert alone["scores"]["dense"] is None
    named = write_export(runs / "ss-ig", tmp_path / "named", dense=runs / "baseline")
    assert named["scores"]["dense"] == expected
    # What is not its baseline is never taken for it.
    config = read(runs / "baseline" / "config.json")
    (runs / "baseline" / "config.json").write_text(json.dumps({**config, "net": "mlp:9"}))
    with pytest.raises(ValueError, match=r"no dense baseline of .*: net is 'mlp:9', not 'mlp:8'"):
        write_export(runs / "ss-ig", tmp_path / "other", dense=runs / "baseline")
    assert not (tmp_path / "other").exists()
    (runs / "baseline").rename(runs / "dense")
    other = write_export(runs / "ss-ig", tmp_path / "other")
    assert other["scores"]["dense"] is None
    # Of several seeds, it is the one of the same seed.
    (runs / "dense" / "config.json").write_text(json.dumps(config))
    for name in ("ss-ig", "dense"):
        (runs / name).rename(runs / "aside")
        (runs / name).mkdir()
        (runs / "aside").rename(runs / name / "seed-0")
    seeded = write_export(runs / "ss-ig" / "seed-0", tmp_path / "seeded")
    assert seeded["scores"]["dense"] == expected
