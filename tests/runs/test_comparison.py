"""Entries, seeds and baselines: every run in its folder, and one table of all."""

import csv
import dataclasses
import json
import math
import statistics

import pytest
import torch

from pyro_sparse import compare as public_compare
from pyro_sparse import data, models
from pyro_sparse.posterior import log_weights
from pyro_sparse.runs import comparison, experiment
from pyro_sparse.runs.comparison import compare, entry_settings, latency, measure, run_seeds
from pyro_sparse.runs.experiment import PruningError, settings_for
from pyro_sparse.runs.zoo import ZOO

pytestmark = pytest.mark.usefixtures("blank_pictures")

TINY = {"net": "mlp:8", "epochs": 2, "inclusion_lr": 1e-4}
BOUNDS = {f"{key}{of}" for key in ("elbo", "importance_weighted_elbo") for of in ("", "_error")}
MEASURED = {*BOUNDS, "gradient_variance", "gradient_noise"}
LATENCIES = {"latency_torch_ms", "latency_onnx_ms"}


def read(path):
    return json.loads(path.read_text())


def nothing_kept(**options):
    """Settings under which every unit leaves at once."""
    return settings_for(
        *("ss-ig", "digits"),
        **{**TINY, "inclusion_lr": 5.0, "kl_start": 1.0, "inclusion_probability": 1e-9, **options},
    )


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", validation=0.05)


# -- entries ---------------------------------------------------------------------------------------


def test_an_entry_has_settings_of_its_own():
    settings = entry_settings("ss-ghs:variance=full,num-particles=3,rule=none", "digits", lr=0.5)
    assert settings == settings_for(
        "ss-ghs", "digits", variance="full", num_particles=3, lr=0.5, rule=None
    )
    # Its own ones come before those of all, and "none" is a value.
    shared = {"rule": "median:0.9", "inclusion_probability": 0.2}
    assert entry_settings("ss-ghs:rule=none", "digits", **shared).rule is None
    assert entry_settings("ss-ghs:rule=macs:10:magnitude", "digits").rule == "macs:10:magnitude"
    # Shared settings that a model does not take are left out, its own are an error.
    assert "inclusion" not in entry_settings("dense", "digits", inclusion="soft").guide_options
    with pytest.raises(ValueError, match="unknown setting 'inclusion'"):
        entry_settings("dense:inclusion=soft", "digits")


# -- compare ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two guides of SS-IG with two seeds; the second run of one of them starts another table."""
    out = tmp_path_factory.mktemp("compared")
    entries = ["ss-ig", "ss-ig:initial_scale=0.2", "dense"]
    result = public_compare(
        entries, "digits", out, seeds=2, baseline="dense", progress=False, seed=3, **TINY
    )
    return out, result


def test_every_entry_with_every_seed(compared):
    out, result = compared
    assert [(run["entry"], run["seed"]) for run in result.runs] == [
        (entry, seed) for seed in (3, 4) for entry in ("ss-ig", "ss-ig:initial_scale=0.2", "dense")
    ]
    assert read(out / "compare.json") == result.runs
    for run in result.runs:
        assert read(out / run["run"] / "summary.json") == run
        assert read(out / run["run"] / "config.json")["seed"] == run["seed"]
        assert set(run) >= MEASURED - BOUNDS | LATENCIES
        assert BOUNDS & set(run) == (BOUNDS if run["model"] != "dense" else set())
    options = [read(out / run["run"] / "config.json")["guide_options"] for run in result.runs[:2]]
    assert [chosen["initial_scale"] for chosen in options] == ["balanced", 0.2]
    assert result.runs[1]["run"] == "ss-ig-initial_scale=0.2/seed-3"


def test_the_table_has_means_errors_and_tests(compared):
    out, result = compared
    table = result.table
    assert table.baseline == "dense"
    assert list(table.rows) == ["ss-ig", "ss-ig:initial_scale=0.2", "dense"]
    values = [run["nll_compact"] for run in result.runs if run["entry"] == "ss-ig"]
    cell = table.rows["ss-ig"]["nll_compact"]
    assert cell.mean == pytest.approx(statistics.mean(values))
    assert cell.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(2))
    assert cell.p_value is not None
    assert table.rows["dense"]["nll_compact"].p_value is None
    assert read(out / "table.json") == table.to_dict()
    for text in (str(result), (out / "report.html").read_text()):
        assert "ss-ig:initial_scale=0.2" in text
        assert "mlp:8, 2 epochs, seeds 3, 4" in text
        assert "None where there is no evidence" in " ".join(text.split())
    with (out / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["elbo"]) for row in rows if row["elbo"]] == [
        run["elbo"] for run in result.runs if "elbo" in run
    ]


def test_data_are_those_of_each_entrys_settings_and_read_once_a_seed(monkeypatch, tmp_path):
    read_for, trained_on = [], []
    load, run = comparison.load_data, comparison.run

    def noted_load(settings, *rest):
        read_for.append((settings.validation, settings.seed))
        return load(settings, *rest)

    def noted_run(settings, out, *, dataset, **options):
        whole = len(dataset.train) + len(dataset.validation)
        share = len(dataset.validation) / whole
        trained_on.append((settings.seed, settings.validation, round(share, 2)))
        return run(settings, out, dataset=dataset, **options)

    monkeypatch.setattr(comparison, "load_data", noted_load)
    monkeypatch.setattr(comparison, "run", noted_run)
    entries = ["dense", "ss-ig", "dense:validation=0.3"]
    compare(entries, "digits", tmp_path, seeds=2, progress=False, measured=False, **TINY)
    own = [(0.05, 0.05), (0.05, 0.05), (0.3, 0.3)]
    assert trained_on == [(seed, *one) for seed in (0, 1) for one in own]
    assert sorted(read_for) == [(0.05, 0), (0.05, 1), (0.3, 0), (0.3, 1)]


def test_seeds_are_runs_that_can_be_read_back(compared):
    """A seed has its own validation part, so the bounds are those of its own training data."""
    out, result = compared
    run = result.runs[3]
    settings, dataset, posterior = experiment.load(out / run["run"])
    assert settings.seed == 4
    again = measure(settings, posterior, dataset)
    for key in ("elbo", "importance_weighted_elbo", "gradient_variance"):
        assert again[key] == pytest.approx(run[key], rel=1e-5), key


def test_bounds_are_those_of_the_guide(compared):
    out, result = compared
    settings, dataset, posterior = experiment.load(out / result.runs[0]["run"])
    found = measure(settings, posterior, dataset, draws=50)
    torch.manual_seed(9)
    train = dataset.train
    ratios = log_weights(posterior.model, posterior.guide, train.x, train.y, num_samples=50)
    error = float(ratios.std()) / math.sqrt(50) / len(train)
    assert found["elbo"] == pytest.approx(float(ratios.mean()) / len(train), abs=6 * error)
    assert found["elbo_error"] == pytest.approx(error, rel=0.5)
    assert found["importance_weighted_elbo"] > found["elbo"]


@pytest.mark.parametrize("model", ["sbp", "bc-gnj", "bmr:guide=auto-delta"])
def test_no_bound_where_there_is_no_evidence(model, digits, tmp_path):
    """Point estimates of weights, and an improper prior."""
    result = compare([model], digits, tmp_path / "out", progress=False, **TINY)
    (run,) = result.runs
    assert MEASURED & set(run) == MEASURED - BOUNDS
    # Of one seed, scores have the standard errors of their rows.
    cell = result.table.rows[model]["accuracy_compact"]
    share = run["accuracy_compact"]
    binomial = math.sqrt(share * (1 - share) / (len(digits.test) - 1))
    assert cell.standard_error == pytest.approx(binomial)
    assert "standard error by the test set's rows" in result.table.footnote


def test_what_is_too_dear_is_not_measured(compared, monkeypatch):
    out, result = compared
    monkeypatch.setattr(comparison, "MOST_MACS", 1000)
    settings, dataset, posterior = experiment.load(out / result.runs[0]["run"])
    assert set(measure(settings, posterior, dataset)) == MEASURED - BOUNDS


def test_latency_is_that_of_the_compact_network(compared, monkeypatch):
    out, result = compared
    settings, dataset, posterior = experiment.load(out / result.runs[0]["run"])
    assert set(latency(settings, posterior, dataset)) == LATENCIES

    def refuse(*arguments, **options):
        raise ValueError("ONNX has no such operation")

    monkeypatch.setattr(comparison, "time_alone", refuse)
    assert latency(settings, posterior, dataset) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entries": ["ss-ig", "ss-ig"]}, "'ss-ig' is there twice"),
        ({"entries": []}, "at least one entry"),
        ({"entries": ["ss-igh"]}, "Did you mean ss-ig"),
        ({"entries": ["ss-ig:varianc=full"]}, "Did you mean variance"),
        ({"entries": ["ss-ig:lr=fast"]}, "lr must be a number, got 'fast'"),
        ({"entries": ["ss-ig:variance"]}, "expected variance=VALUE"),
        ({"entries": ["ss-ig:seed=1"]}, "unknown setting 'seed'"),
        ({"entries": ["ss-ig:variance=half"]}, "'tied', 'row', 'full' or"),
        ({"entries": ["ss-ig"], "baseline": "dense"}, "expected a baseline among ss-ig"),
        ({"entries": ["ss-ig"], "seeds": 0}, "at least one seed"),
        ({"entries": ["ss-ig"], "jobs": 0}, "at least one job"),
    ],
)
def test_mistakes_are_told_before_training(options, message, tmp_path, digits):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        compare(**{"data": digits, "out": out, "progress": False, **TINY, **options})
    assert not out.exists()


def test_compare_of_a_model_that_selects_nothing(digits, tmp_path):
    settings = [nothing_kept(), settings_for("dense", "digits", **TINY)]
    plain = {"progress": False, "measured": False}
    result = compare(settings, digits, tmp_path, **plain)
    assert [run["model"] for run in result.runs] == ["ss-ig", "dense"]
    assert result.runs[0]["said"].startswith("Nothing is selected")
    assert read(tmp_path / "compare.json") == result.runs
    with pytest.raises(ValueError, match="already holds a comparison"):
        compare(settings, digits, tmp_path, **plain)
    # Going on reads what is finished, and measures what was not.
    again = compare(settings, digits, tmp_path, resume=True, progress=False)
    assert again.runs[1] == again.runs[1] | result.runs[1]
    assert "gradient_variance" in again.runs[1]
    (tmp_path / "compare.json").unlink()
    # Nor is a run overwritten that stands there without the comparison.
    with pytest.raises(ValueError, match="already holds a comparison"):
        compare(settings[:1], digits, tmp_path, **plain)


def test_nothing_selected_is_a_result(digits, tmp_path):
    (run,) = compare([nothing_kept()], digits, tmp_path, progress=False).runs
    assert run["said"].startswith("Nothing is selected: layer 'fc1' keeps no unit")
    assert run["kept"] == {"fc1": 0}


# -- a model of one's own --------------------------------------------------------------------------


class Doubtful(models.SpikeSlabGaussian):
    """A model outside the zoo; its guide is that of its parent."""

    def __init__(self, net, example, **options):
        super().__init__(net, example, inclusion_probability=0.02, **options)


def test_a_model_of_ones_own(digits, tmp_path, monkeypatch):
    entry = dataclasses.replace(
        ZOO["ss-ig"], name="doubtful", model=f"{__name__}:Doubtful", model_options=()
    )
    monkeypatch.setitem(ZOO, "doubtful", entry)
    plain = {"progress": False, "measured": False, **TINY}
    result = compare(["doubtful:variance=full", "ss-ig"], digits, tmp_path, **plain)
    assert [run["model"] for run in result.runs] == ["doubtful", "ss-ig"]
    _, _, posterior = experiment.load(tmp_path / "doubtful-variance=full")
    assert isinstance(posterior.model, Doubtful)


# -- several runs at a time ------------------------------------------------------------------------


def numbers(runs):
    """All but what depends on the clock, and how many runs there were at a time."""
    timed = {*LATENCIES, "train_seconds", "seconds_per_epoch", "jobs", "path"}
    return [{key: value for key, value in run.items() if key not in timed} for run in runs]


@pytest.mark.slow
@pytest.mark.parametrize("given", ["by name", "in memory"])
def test_runs_at_a_time_are_runs_one_by_one(given, digits, tmp_path, capsys):
    """To the last bit; the pruner's budget too, which depends on the others' results."""
    # By name, each seed has data of its own; two entries are enough for the two budgets.
    data_of, seeds = ("digits", 2) if given == "by name" else (digits, 1)
    entries = ["ss-ig:rule=top:5", "magnitude", "dense"][: 4 - seeds]
    plain = {"net": "mlp:8", "epochs": 1, "seeds": seeds}
    alone = compare(entries, data_of, tmp_path / "alone", progress=False, **plain)
    together = compare(entries, data_of, tmp_path / "together", jobs=3, **plain)
    assert numbers(together.runs) == numbers(alone.runs)
    printed = capsys.readouterr().out
    count = len(alone.runs)
    assert f"\n{count} of {count}: pruning by magnitude" in printed.lower()
    assert "Seconds: with up to 3 runs at a time" in str(together)
    assert "runs at a time" not in str(alone)
    assert all(run["latency_torch_ms"] > 0 for run in together.runs)
    # What is there is read, not trained again.
    again = compare(entries, data_of, tmp_path / "together", resume=True, progress=False, **plain)
    assert again.runs == together.runs


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other(tmp_path):
    entries = ["dense:lr=1e30", "dense:lr=0.01", "ss-ig:inclusion_lr=5,kl_start=1,lr=1e-4"]
    plain = {"net": "mlp:8", "epochs": 1, "progress": False, "measured": False}
    with pytest.raises(ChildProcessError, match=r"dense:lr=1e30: Divergence.*go on with --resume"):
        compare(entries, "digits", tmp_path, jobs=2, **plain)
    assert read(tmp_path / "compare.json")[0]["entry"] == "dense:lr=0.01"
    assert (tmp_path / "dense-lr=0.01" / "report.html").is_file()


def test_seeds_of_one_model(tmp_path, capsys):
    """Each a run folder, and one page of all."""
    settings = settings_for("ss-ig", "digits", seed=5, **TINY)
    summaries = run_seeds(settings, tmp_path, 2)
    assert [one["seed"] for one in summaries] == [5, 6]
    assert {**read(tmp_path / "seed-6" / "summary.json"), "run": "seed-6"} == summaries[1]
    assert "ss-ig on digits, 2 seeds" in (tmp_path / "report.html").read_text()
    assert "seed 6" in capsys.readouterr().out
    with pytest.raises(ValueError, match="already holds a run"):
        run_seeds(settings, tmp_path, 2)
    with pytest.raises(ValueError, match="already holds a run"):
        run_seeds(settings, tmp_path / "seed-5", 2)


# -- reference pruners -----------------------------------------------------------------------------


REFERENCE = {"net": "mlp:8", "epochs": 2}


def test_compare_gives_the_reference_pruners_the_others_budget(digits, tmp_path):
    """They come last, and stay within the median of what the others cost."""
    names = ["random", "ss-ghs", "magnitude", "sbp", "bmrs", "dense"]
    # Half of the units of one, all of the others: the median is a budget in between.
    rules = {"ss-ghs": "top:3", "sbp": "top:5:noise-signal", "bmrs": "top:6:noise-signal"}
    settings = [
        settings_for(name, "digits", **REFERENCE, rule=rules.get(name), retrain=0.5)
        for name in names
    ]
    summaries = compare(settings, digits, tmp_path, progress=False, measured=False).runs
    assert [summary["model"] for summary in summaries] == [
        *("ss-ghs", "sbp", "bmrs", "dense"),
        *("random", "magnitude"),
    ]
    costs = {summary["model"]: summary["macs_compact"] for summary in summaries}
    assert [costs[name] for name in rules] == [74 * 3, 74 * 5, 74 * 6]
    budget = statistics.median(costs[name] for name in rules)
    for name in ("random", "magnitude"):
        assert costs[name] == budget
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["budget"] == budget
        assert not ZOO[name].bayesian
    assert [s["model"] for s in json.loads((tmp_path / "compare.json").read_text())] == [
        summary["model"] for summary in summaries
    ]


def test_a_budget_that_cannot_be_kept_stops_one_pruner_only(digits, tmp_path, capsys):
    settings = [
        settings_for("magnitude", "digits", **REFERENCE, budget=20.0),
        settings_for("random", "digits", **REFERENCE, budget=300.0),
    ]
    summaries = compare(settings, digits, tmp_path, progress=False, measured=False).runs
    assert [summary["model"] for summary in summaries] == ["random"]
    assert "magnitude: one unit a group already costs 74 MACs" in capsys.readouterr().out
    with pytest.raises(PruningError, match="budget of 20"):
        experiment.run(settings[0], tmp_path / "alone", dataset=digits, progress=False)
