"""From a data set's name to a run folder, and back."""

import dataclasses
import json
import math
import os
import sys
import types

import pytest
import torch
from torch import nn

from pyro_sparse import data, export, guides, models, nets
from pyro_sparse.infer import read_json as read
from pyro_sparse.posterior import Posterior
from pyro_sparse.runs import experiment
from pyro_sparse.runs.experiment import Settings, settings_for
from pyro_sparse.runs.settings import SIZES

TINY = {"net": "mlp:8", "epochs": 2, "inclusion_lr": 1e-4}
SCORED = ("ensemble", "compact")
KEYS = {
    *("model", "net", "data", "seed", "epochs"),
    *("params_dense", "params_compact", "macs_dense", "macs_compact"),
    *("units", "kept", "undecided"),
    *("train_seconds", "seconds_per_epoch", "max_abs_diff_masked_compact"),
    *("task", "target", "classes", "rows", "taken", "notes", "cautions"),
}
"""What every summary.json has."""


@pytest.fixture(scope="module")
def diabetes():
    return data.load("diabetes", validation=0.05)


def nothing_kept(**options):
    """Settings under which every unit leaves at once."""
    return settings_for(
        *("ss-ig", "digits"),
        **{**TINY, "inclusion_lr": 5.0, "kl_start": 1.0, "inclusion_probability": 1e-9, **options},
    )


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "shape", "net", "epochs", "batch_size", "inclusion_stop"),
    [
        (60_000, (1, 28, 28), "mlp:400-400", 60, 256, 0.22),
        (1438, (1, 8, 8), "mlp:100-100", 120, 64, 1.0),
        (277, (6,), "mlp:50", 300, 32, 1.0),
        (1440, (11,), "mlp:50", 300, 32, 1.0),
        (50_000, (3, 32, 32), "resnet20", 300, 128, 1.0),
    ],
    ids=["mnist", "digits", "yacht", "wine", "cifar10"],
)
def test_defaults_by_size(n, shape, net, epochs, batch_size, inclusion_stop):
    """The figures that were measured, of docs/schedule.md, by size and not by name."""
    x, y = torch.zeros(1, *shape).expand(n, *shape), torch.zeros(n, dtype=torch.int64)
    part, none = data.Split(x, y), data.Split(x[:0], y[:0])
    dataset = data.Dataset("any", "classification", part, none, part, 10, None, {})
    settings = settings_for("ss-ig", dataset)
    assert (settings.net, settings.epochs, settings.batch_size) == (net, epochs, batch_size)
    assert settings.inclusion_stop == inclusion_stop


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_sizes_that_are_known_are_those_of_the_data(name):
    dataset = data.load(name, validation=0.1)
    assert SIZES[name] == (len(dataset.train) + len(dataset.validation), dataset.input_shape)


def test_what_is_given_counts():
    digits = settings_for("ss-ig", "digits")
    # What is not given keeps its default, what is given counts.
    assert settings_for("ss-ig", "digits", epochs=None, lr=1.0) == dataclasses.replace(
        digits, lr=1.0
    )


def test_settings_survive_json():
    settings = settings_for("ss-gl", "digits", inclusion_probability=0.2, initial_scale=0.1)
    assert Settings(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_unknown_model():
    with pytest.raises(ValueError, match="Did you mean ss-ghs"):
        settings_for("ssghs", "digits")


def test_the_seed_decides_the_initial_weights(digits):
    def weights(seed):
        settings = settings_for("ss-ig", "digits", seed=seed, **TINY)
        _, guide = experiment.build(settings, digits)
        return guide.mean_rows()["fc1"]

    state = torch.get_rng_state()
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.get_rng_state(), state)


# -- run -----------------------------------------------------------------------------------------


def test_run_folder(folder):
    summary = read(folder / "summary.json")
    scores = {f"{score}_{of}" for score in ("accuracy", "nll", "ece") for of in SCORED}
    assert set(summary) >= KEYS | scores
    assert summary["model"] == "ss-ghs"
    assert summary["net"] == "mlp:8"
    assert summary["data"] == "digits"
    assert summary["epochs"] == 2
    assert summary["units"] == {"fc1": 8}
    assert summary["kept"] == {"fc1": 8}
    assert summary["params_dense"] == summary["params_compact"] == 64 * 8 + 8 + 8 * 10 + 10
    assert summary["macs_dense"] == 64 * 8 + 8 * 10
    assert 0 <= summary["accuracy_compact"] <= 1
    assert summary["max_abs_diff_masked_compact"] <= 1e-5
    assert summary["train_seconds"] > 0
    assert Settings(**read(folder / "config.json")) == settings_for("ss-ghs", "digits", **TINY)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(0 <= line["validation_accuracy"] <= 1 for line in lines)
    assert all(math.isfinite(line["validation_elbo_per_datum"]) for line in lines)
    kept = {path.name for path in (folder / "checkpoint").iterdir()}
    assert kept - {"lock"} == {"last.safetensors", "best.safetensors"}
    for name in ("training", "inclusion", "strips", "units", "network", "fields"):
        assert (folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.rglob("*.tmp"))


def test_the_ensembles_temperature(folder, digits):
    """Fitted on validation rows, a number that is given, or 1 where there are no rows."""
    settings, dataset, posterior = experiment.load(folder)
    found = experiment.ensemble_temperature(settings, posterior, dataset)
    assert found == read(folder / "summary.json")["temperature"] != 1
    given = dataclasses.replace(settings, ensemble_temperature=0.7)
    assert experiment.ensemble_temperature(given, posterior, dataset) == 0.7
    empty = dataclasses.replace(
        dataset, validation=data.Split(digits.test.x[:0], digits.test.y[:0])
    )
    assert experiment.ensemble_temperature(settings, posterior, empty) == 1
    wrong = dataclasses.replace(settings, ensemble_temperature="cold")
    with pytest.raises(ValueError, match="number or 'validation', got 'cold'"):
        experiment.ensemble_temperature(wrong, posterior, dataset)


def test_the_same_seed_gives_the_same_run(folder, digits, tmp_path):
    settings = settings_for("ss-ghs", "digits", **TINY)
    again = experiment.run(
        settings, tmp_path / "again", dataset=digits, progress=False, figures=False
    )
    first = read(folder / "summary.json")
    for key in set(first) - {"train_seconds", "seconds_per_epoch"}:
        assert again[key] == first[key], key
    assert not (tmp_path / "again" / "figures").exists()


def test_regression(diabetes, tmp_path):
    settings = settings_for("ss-gl", "diabetes", prune_inputs=True, **TINY)
    out = tmp_path / "run"
    summary = experiment.run(settings, out, dataset=diabetes, progress=False, figures=False)
    assert set(summary) == KEYS | {"inputs", "objective"} | {
        f"{score}_{of}{end}" for score in ("rmse", "nll") for of in SCORED for end in ("", "_error")
    }
    assert summary["units"] == {"input": 10, "fc1": 8}
    # In the unit of the target, whose standard deviation is 77: an untrained net is near that.
    assert 30 < summary["rmse_compact"] < 120
    assert 4 < summary["nll_compact"] < 8
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["validation_rmse"]) for line in lines)


def test_the_prior_of_the_noise(diabetes):
    for rate in (1.0, 0.02):
        model, _ = experiment.build(
            settings_for("ss-ig", "diabetes", noise_rate=rate, **TINY), diabetes
        )
        assert float(model.likelihood.rate) == pytest.approx(rate)
    assert settings_for("ss-ig", "diabetes").noise_rate == 1.0


def test_the_dense_baseline_keeps_everything(digits, tmp_path):
    settings = settings_for("dense", "digits", **TINY)
    out = tmp_path / "run"
    summary = experiment.run(settings, out, dataset=digits, progress=False)
    assert summary["kept"] == summary["units"] == {"fc1": 8}
    assert summary["undecided"] == {"fc1": 0}
    assert summary["params_dense"] == summary["params_compact"]
    # One network: no ensemble to speak of.
    assert summary["accuracy_ensemble"] == summary["accuracy_compact"]
    names = {path.stem for path in (out / "figures").iterdir()}
    assert names == {"training", "network", "fields"}


def test_without_a_validation_set(tmp_path):
    settings = settings_for("ss-ig", "digits", validation=0.0, **TINY)
    dataset = experiment.load_data(settings, None)
    experiment.run(settings, tmp_path / "run", dataset=dataset, progress=False)
    line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert not any(key.startswith("validation") for key in json.loads(line))


def test_a_folder_that_holds_a_run(folder, digits):
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; choose another folder"):
        experiment.run(settings_for("dense", "digits", **TINY), folder, dataset=digits)
    assert (folder / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"kl_hold": 0.9, "kl_rise": 0.9}, {"slab_scale": 0.0}]
)
def test_refused_before_training(digits, tmp_path, wrong):
    """... and the folder stays free for the next attempt."""
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="expected"):
        experiment.run(
            settings_for("ss-ig", "digits", **{**TINY, **wrong}),
            out,
            dataset=digits,
            progress=False,
        )
    assert not out.exists() or not list(out.iterdir())


def test_nothing_selected_is_a_result(digits, tmp_path):
    out = tmp_path / "run"
    summary = experiment.run(nothing_kept(), out, dataset=digits, progress=False)
    assert summary["kept"]["fc1"] == 0
    assert summary["said"].startswith("Nothing is selected: layer 'fc1' keeps no unit")
    assert (out / "report.html").is_file()
    # What was trained can still be looked at.
    _, _, posterior = experiment.load(out)
    assert posterior.summary().groups[0].kept == 0


# -- going on ------------------------------------------------------------------------------------

PHASES = {
    **{"net": "mlp:6", "batch_size": 128, "lr": 0.05, "scale_lr": 0.05},
    **{"pretrain": 2, "epochs": 5, "passes": 2},
}
"""Pretraining, training and pruning passes, in a second."""


class Killed(BaseException):
    pass


def killed_before(writes, monkeypatch):
    """From now on, the process ends before that many files have taken their places."""
    done = 0
    replace = os.replace

    def replacing(source, target):
        nonlocal done
        done += 1
        if done == writes:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing)
    return lambda: done


@pytest.fixture(scope="module")
def phases(diabetes, outcome, tmp_path_factory):
    """A run with every phase that was never stopped, and how many files it moved into place."""
    out = tmp_path_factory.mktemp("phases") / "run"
    with pytest.MonkeyPatch.context() as patch:
        count = killed_before(-1, patch)
        settings = settings_for("bmr", "diabetes", **PHASES)
        experiment.run(settings, out, dataset=diabetes, progress=False, figures=False)
    names = set(outcome(out)[0])
    assert names >= {
        *("checkpoint/last.safetensors", "checkpoint/best.safetensors"),
        *("checkpoint/pruned.safetensors", "pretrain/checkpoint/last.safetensors"),
        "pass-2/checkpoint/last.safetensors",
    }
    return out, count()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_a_run_goes_on_from_any_phase(phases, share, diabetes, outcome, tmp_path, monkeypatch):
    whole, count = phases
    settings = settings_for("bmr", "diabetes", **PHASES)
    options = {"dataset": diabetes, "progress": False, "figures": False}
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_before(1 + round(share * (count - 1)), patch)
        with pytest.raises(Killed):
            experiment.run(settings, out, **options)
    summary = experiment.run(settings, out, resume=True, **options)
    assert summary == read(out / "summary.json")
    assert outcome(out) == outcome(whole)
    # What is finished is read, not made again.
    assert experiment.run(settings, out, resume=True, **options) == summary


def test_going_on_with_other_settings(phases, diabetes, outcome):
    whole, _ = phases
    settings = settings_for("bmr", "diabetes", **{**PHASES, "epochs": 4, "seed": 1})
    before = outcome(whole)
    with pytest.raises(ValueError, match=r"other settings: --epochs was 5, is 4; --seed was 0, is"):
        experiment.run(settings, whole, dataset=diabetes, resume=True)
    assert outcome(whole)[1] == before[1]


def test_a_damaged_checkpoint_does_not_lose_the_run(diabetes, tmp_path):
    settings = settings_for("ss-ig", "diabetes", net="mlp:6", epochs=2)
    options = {"dataset": diabetes, "progress": False, "figures": False}
    experiment.run(settings, tmp_path, **options)
    (tmp_path / "report.html").unlink()
    file = tmp_path / "checkpoint" / "last.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"is damaged.*best\.safetensors"):
        experiment.run(settings, tmp_path, resume=True, **options)
    file.write_bytes(content)
    experiment.run(settings, tmp_path, resume=True, **options)


def test_the_best_of_a_pruned_run(phases):
    with pytest.raises(ValueError, match="was pruned after training"):
        experiment.load(phases[0], checkpoint="best")
    *_, posterior = experiment.load(phases[0])
    assert posterior.model.support.restricted


# -- load ----------------------------------------------------------------------------------------


def test_load_gives_the_posterior_back(folder, digits):
    settings, dataset, posterior = experiment.load(folder)
    summary = read(folder / "summary.json")
    assert settings.model == "ss-ghs"
    assert torch.equal(dataset.test.x, digits.test.x)
    keep = posterior.keep()
    assert {name: int(keep[name].sum()) for name in summary["kept"]} == summary["kept"]
    output = posterior.masked(dataset.test.x)
    accuracy = (output.argmax(-1) == dataset.test.y).double().mean()
    assert float(accuracy) == pytest.approx(summary["accuracy_compact"])


def test_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run \(no config\.json\)"):
        experiment.load(tmp_path)


@pytest.mark.parametrize("text", ["{damaged", '{"widths": [3, 2]}', "[]"])
def test_a_config_that_is_no_runs(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json does not hold the settings of a run"):
        experiment.load(tmp_path)


def test_of_a_run_without_checkpoint(folder, tmp_path):
    for name in ("config.json", "data.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        experiment.load(tmp_path)


def test_recipe_for_residual_networks():
    settings = experiment.settings_for("ss-gl", "cifar10")
    assert (settings.net, settings.epochs, settings.batch_size) == ("resnet20", 300, 128)
    assert (settings.optimizer, settings.lr, settings.schedule) == ("sgd", 0.1, "steps")
    assert (settings.clip_norm, settings.model_options["slab_scale"]) == (1.0, 0.2)
    assert settings.model_options["inclusion_probability"] == 1e-4
    assert settings.augment


def test_images_from_folders_train_with_augmentation(tmp_path):
    """The recipe in small: a few images, three epochs, SGD."""
    from PIL import Image

    for part, count in (("train", 12), ("test", 3)):
        for label in ("dark", "light"):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                level = 40 + 10 * i + 100 * (label == "light")
                Image.new("RGB", (16, 16), (level % 256, level % 256, 90)).save(folder / f"{i}.png")
    settings = experiment.settings_for(
        *("ss-gl", f"folder:{tmp_path / 'data'}"),
        **{"net": "lenet5-caffe", "epochs": 3, "batch_size": 8, "validation": 0.2},
        inclusion_probability=0.5,
    )
    dataset = experiment.load_data(settings, None)
    assert dataset.classes == 2
    summary = experiment.run(settings, tmp_path / "run", dataset=dataset, progress=False)
    assert summary["max_abs_diff_masked_compact"] <= 1e-5
    assert summary["params_compact"] <= summary["params_dense"]


def test_batch_normalisation_is_shipped_with_statistics_of_its_own(tmp_path, monkeypatch):
    module = types.ModuleType("normalised_net")
    module.build = lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
    )
    monkeypatch.setitem(sys.modules, "normalised_net", module)
    settings = settings_for("ss-gl", "digits", net="normalised_net:build", epochs=1)
    dataset = experiment.load_data(settings, None)
    summary = experiment.run(settings, tmp_path / "run", dataset=dataset, progress=False)
    assert summary["max_abs_diff_masked_compact"] <= 1e-5
    _, _, posterior = experiment.load(tmp_path / "run", trust=True)
    saved = posterior.model.net.get_buffer("2.running_mean").clone()
    posterior.refresh_statistics()
    # The checkpoint has them: what is loaded, shipped and scored is one network.
    torch.testing.assert_close(posterior.model.net.get_buffer("2.running_mean"), saved)
    small = export.compact(posterior)
    keep = posterior.keep()["1"]
    torch.testing.assert_close(small[2].running_mean, saved[keep])


def test_the_dense_network_has_a_size_where_what_it_computes_overflows():
    """Few units are in: normalisations have their statistics, which are no others'."""
    torch.manual_seed(0)
    net = nets.build("resnet20", (3, 8, 8), 3)
    model = models.SpikeSlabGroupLasso(
        net, torch.zeros(2, 3, 8, 8), num_data=10, inclusion_floor=0.0
    )
    for layer in nets.normalisations(model.net):
        layer.running_var.zero_()
    posterior = Posterior(model, guides.for_model(model))
    dense = experiment.dense_network(posterior)
    assert nets.count_parameters(dense) == nets.count_parameters(net)


def test_a_network_that_should_not_be_shipped_yet_is_said_to_be_one():
    dataset = data.load("digits", validation=0.05)
    settings = settings_for(
        "ss-ig", "digits", net="mlp:12", epochs=2, validation=0.05, inclusion_probability=0.5
    )
    posterior = Posterior(*experiment.build(settings, dataset))
    summary = experiment.summarise(settings, posterior, dataset)
    assert any("nothing was pruned" in caution for caution in summary["cautions"])


# -- the data of a run -----------------------------------------------------------------------------


def write_table(path, scale=1.0, order=1, flip=False):
    """Two columns and a class, in one of two forms of everything that may change."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 2, generator=generator)
    lines = [f"{a * scale:.6f},{b:.6f},{int((a + b > 0) != flip)}" for a, b in rows.tolist()]
    path.write_text("\n".join(["first,second,y", *lines[::order]]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scale": 1000.0}, "preprocessing: inputs"),
        ({"order": -1}, "train: digest"),
        ({"flip": True}, "train: digest"),
    ],
    ids=["unit", "rows", "labels"],
)
def test_other_data_than_those_of_training_are_refused(change, named, tmp_path):
    path, out = tmp_path / "table.csv", tmp_path / "run"
    write_table(path)
    settings = settings_for("dense", f"csv:{path}", net="mlp:4", epochs=1)
    dataset = experiment.load_data(settings, None)
    experiment.run(settings, out, dataset=dataset, progress=False, figures=False)
    about = read(out / "data.json")
    assert about["features"] == ["first", "second"]
    assert about["train"]["rows"] == len(dataset.train)
    experiment.load(out)
    write_table(path, **change)
    with pytest.raises(ValueError, match=f"not those that it was trained on.*{named}"):
        experiment.load(out)
    with pytest.raises(ValueError, match=named):
        experiment.run(
            settings, out, dataset=experiment.load_data(settings, None), resume=True, progress=False
        )
