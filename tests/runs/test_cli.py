"""The command line: each verb end to end, and each mistake answered in one line."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pyro_sparse import export
from pyro_sparse.nets import mlp
from pyro_sparse.runs.cli import main
from pyro_sparse.runs.zoo import ZOO

pytestmark = pytest.mark.usefixtures("blank_pictures")

# Small, and gentle with the inclusions: every unit stays.
TINY = ["--data", "digits", "--net", "mlp:8", "--epochs", "2", "--inclusion-lr", "1e-4", "--quiet"]


@pytest.fixture(autouse=True)
def _no_data_root(monkeypatch):
    monkeypatch.delenv("PYRO_SPARSE_DATA", raising=False)


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments):
    """The message of a command that fails as it should: one line, and no traceback."""
    result = call(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in result.output
    return last


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tiny run."""
    out = tmp_path_factory.mktemp("runs") / "ss-ig"
    output = succeed("fit", "ss-ig", *TINY, "--out", out)
    assert str(out) in output
    return out


# -- help ----------------------------------------------------------------------------------------


def test_help_lists_the_commands():
    output = succeed("--help")
    for command in ("zoo", "fit", "compare", "analyse", "export", "bench"):
        assert f"\n  {command} " in output
    assert "pyro-sparse compare ss-ig ss-gl ss-ghs --data digits" in output
    assert succeed("-h") == output


@pytest.mark.parametrize(
    "command", ["zoo", "fit", "compare", "analyse", "export", "bench", "predict"]
)
def test_help_of_every_command(command):
    output = succeed(command, "--help")
    assert output.startswith("Usage: ")
    # Every option says what it is for.
    lines = output.splitlines()
    options = lines[lines.index("Options:") + 1 :]
    assert len(options) >= 1
    for option in main.commands[command].params:
        if option.param_type_name == "option":
            assert option.help, option.name


def test_version():
    assert "0." in succeed("--version")


def test_zoo():
    output = succeed("zoo")
    for entry in ZOO.values():
        assert f"{entry.name:<11}{entry.title}" in output
        assert entry.paper in output
    assert output.count("use it") == len(ZOO)


# -- runs ----------------------------------------------------------------------------------------


def test_fit(run):
    summary = read(run / "summary.json")
    assert summary["model"] == "ss-ig"
    assert summary["kept"] == {"fc1": 8}
    names = {path.name for path in run.iterdir()}
    files = {"config.json", "data.json", "metrics.jsonl", "checkpoint", "summary.json", "figures"}
    assert names == files | {"report.html"}


def test_options_reach_the_settings(tmp_path):
    given = {
        "lr": 3e-3,
        "scale_lr": 1e-2,
        "schedule": "linear",
        "lr_hold": 0.1,
        "kl_start": 0.5,
        "kl_hold": 0.1,
        "kl_rise": 0.2,
        "clip_norm": 2.0,
        "num_particles": 2,
        "variance": "full",
        "initial_scale": 0.05,
        "inclusion": "soft",
        "inclusion_probability": 0.3,
        "slab_scale": 0.5,
        "validation": 0.2,
        "batch_size": 200,
        "seed": 7,
    }
    options = []
    for name, value in given.items():
        options += [f"--{name.replace('_', '-')}", value]
    # Few units, or the chain of which inputs are in would take most of the time.
    options += ["--prune-inputs", "--net", "mlp:2"]
    succeed("fit", "ss-ghs", *TINY, *options, "--out", tmp_path / "run")
    config = read(tmp_path / "run" / "config.json")
    written = {**config, **config["model_options"], **config["guide_options"]}
    assert written["prune_inputs"] is True
    assert {name: written[name] for name in given} == given


@pytest.mark.usefixtures("drawn_pictures")
def test_compare(tmp_path):
    out = tmp_path / "runs"
    output = succeed("compare", "ss-gl", "ss-ghs", "ss-gl", *TINY, "--out", out)
    summaries = read(out / "compare.json")
    # In the order given, each once, and the baseline.
    assert [summary["model"] for summary in summaries] == ["ss-gl", "ss-ghs", "dense"]
    for summary in summaries:
        folder = out / summary["model"]
        assert read(folder / "summary.json") == summary
        assert (folder / "figures" / "training.png").is_file()
        assert f"{summary['accuracy_compact']:.2%}" in output
        assert f"<h2>{summary['model']}</h2>" in (out / "report.html").read_text()
    assert (out / "compare.csv").read_text().count("\n") == 4
    assert "ss-ghs & " in (out / "compare.tex").read_text()
    for heading in ("accuracy", "NLL", "ECE", "kept", "undecided", "parameters", "MACs"):
        assert heading in output


def test_compare_guides_over_seeds(tmp_path):
    out = tmp_path / "runs"
    models = ["ss-ig:variance=full", "ss-ig"]
    output = succeed(
        *("compare", *models, *TINY, "--seeds", 2, "--no-measure", "--baseline", "ss-ig"),
        *("--out", out),
    )
    summaries = read(out / "compare.json")
    assert [(one["entry"], one["seed"]) for one in summaries] == [
        (entry, seed) for seed in (0, 1) for entry in (*models, "dense")
    ]
    assert "±: standard error over seeds. *: differs from ss-ig" in " ".join(output.split())
    assert "k-hat" not in output
    # More seeds can be added, and what is there is not made again.
    before = (out / "dense" / "seed-1" / "checkpoint" / "last.safetensors").stat().st_mtime_ns
    again = ("compare", *models, *TINY, "--no-measure", "--seeds", 3, "--resume", "--out", out)
    succeed(*again)
    assert len(read(out / "compare.json")) == 9
    after = (out / "dense" / "seed-1" / "checkpoint" / "last.safetensors").stat().st_mtime_ns
    assert after == before
    assert "--resume needs --out" in fail("compare", "ss-ig", *TINY, "--resume")
    assert "Did you mean variance" in fail("compare", "ss-ig:varience=full", *TINY)


def test_fit_and_analyse_several_seeds(tmp_path):
    out = tmp_path / "seeds"
    output = succeed("fit", "ss-ig", *TINY, "--seeds", 2, "--out", out)
    assert "seeds 0, 1" in output
    assert {path.name for path in out.iterdir()} == {"seed-0", "seed-1", "report.html"}
    assert "What the seeds agree on" not in (out / "report.html").read_text()
    output = succeed("analyse", out, "--draws", 2)
    assert "units, 2 seeds, matched" in output
    assert str(out / "seeds.json") in output
    assert "What the seeds agree on" in (out / "report.html").read_text()
    assert [run["seed"] for run in read(out / "seeds.json")["runs"]] == [0, 1]
    assert "already holds a run" in fail("fit", "ss-ig", *TINY, "--seeds", 2, "--out", out)


def test_compare_of_regressions_in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "dense", "--data", "diabetes", "--net", "mlp:4", "--epochs", "1"]
    output = succeed(*arguments, "--quiet")
    assert "RMSE" in output
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("compare-diabetes-")
    assert [summary["model"] for summary in read(folder / "compare.json")] == ["dense"]


def test_convolutions(tmp_path):
    factory = "pyro_sparse.nets:lenet5_caffe"
    message = fail("fit", "ss-ig", "--data", "digits", "--net", factory, "--out", tmp_path / "run")
    assert "does not accept inputs of shape (1, 8, 8)" in message
    message = fail(
        "fit", "ss-ig", "--data", "digits", "--net", "lenet5-caffe", "--out", tmp_path / "run"
    )
    assert "at least 16×16" in message


def test_analyse(tmp_path):
    out = tmp_path / "run"
    succeed("fit", "ss-ig", *TINY, "--out", out)
    output = succeed("analyse", out, "--draws", 4, "--members", 2)
    found = read(out / "analysis.json")
    assert (found["draws"], found["members"]) == (4, 2)
    assert f"{found['scores']['accuracy_compact']:.2%}" in output
    assert f"{found['calibration']['ensemble']['brier']:.4f}" in output
    for heading in ("expected (95 %)", "2 compact draws", "mutual information", "MACs", "8 *"):
        assert heading in output
    assert str(out / "report.html") in output
    assert "'--draws'" in fail("analyse", out, "--draws", 0)
    assert "holds no run" in fail("analyse", tmp_path)


def test_export(run, tmp_path):
    output = succeed("export", run, "--out", tmp_path / "small", "--no-bench")
    assert "fc1 8" in output
    assert "masked against compact" in output
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names == {"config.json", "model.pt2", "model.safetensors", "dense.pt2", "README.md"}


def test_export_in_every_format_and_bench(run, tmp_path, monkeypatch):
    small = tmp_path / "small"
    output = succeed("export", run, "--out", small, "--int8", "--pt2", "--draws", 3)
    assert "fc1 8" in output
    names = {path.name for path in small.iterdir()}
    files = {"config.json", "README.md", "model.pt2", "model.safetensors", "dense.pt2"}
    files |= {"model.onnx", "model-int8.onnx", "bench.json", "bench.png"}
    assert names == files
    card = (small / "README.md").read_text()
    assert "3 plain torch networks in one" in card
    assert "| 256 | ONNX Runtime |" in card
    assert "| 256 | ONNX Runtime → ONNX Runtime, int8 |" in card
    assert "Int8: weights and activations in 8 bits" in card
    # The folder says what the dense network was: no data, no run.
    monkeypatch.delenv("PYRO_SPARSE_DATA", raising=False)
    before = (small / "model.safetensors").read_bytes()
    output = succeed("bench", small, "--batches", "2,5", "--seconds", 0.01)
    assert [row["batch"] for row in read(small / "bench.json")["ratios"]] == [2] * 4 + [5] * 4
    assert "speed-up" in output
    assert "torch → ONNX" in output
    assert str(small / "bench.png") in output
    card = (small / "README.md").read_text()
    assert "| 5 | torch → ONNX Runtime |" in card
    assert "| 256 |" not in card
    assert (small / "model.safetensors").read_bytes() == before


@pytest.mark.usefixtures("drawn_pictures")
def test_bench_of_a_run(run, monkeypatch):
    from pyro_sparse.export import latency

    monkeypatch.setattr(latency, "onnx_available", lambda: False)
    output = succeed("bench", run, "--batches", "4", "--seconds", 0.01, "--threads", 2)
    measured = read(run / "bench.json")
    assert measured["threads"] == 2
    assert measured["macs"]["compact"] == read(run / "summary.json")["macs_compact"]
    assert "pip install 'pyro-sparse[onnx]'" in output
    assert (run / "bench.png").read_bytes()[1:4] == b"PNG"
    for name in ("bench.json", "bench.png"):
        (run / name).unlink()


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "digitz"], "unknown data set 'digitz'. Did you mean digits?"),
        (["--net", "mpl:8"], "unknown net 'mpl:8'. Did you mean mlp:400-400?"),
        (["--net", "mlp:8-x"], "expected widths such as mlp:400-400"),
        (["--inclusion-probability", "0"], "inclusion_probability strictly between 0 and 1"),
        (["--inclusion-probability", "1.5"], "inclusion_probability strictly between 0 and 1"),
        (["--inclusion-probability", "few"], "inclusion_probability to be a number"),
        (["--slab-scale", "-1"], "positive, finite slab_scale, got -1"),
        (["--initial-scale", "-0.1"], "positive initial_scale"),
        (["--lr", "-1"], "lr to be a positive number, got -1"),
        (["--inclusion-lr", "0"], "inclusion_lr to be a positive number, got 0"),
        (["--scale-lr", "nan"], "scale_lr to be a positive number, got nan"),
        (["--clip-norm", "-2"], "clip_norm to be a positive number"),
        (["--epochs", "0"], "'--epochs'"),
        (["--batch-size", "0"], "'--batch-size'"),
        (["--kl-start", "-2"], "'--kl-start'"),
        (["--validation", "1"], "expected validation to be a share in [0, 1)"),
        (["--split", "3"], "single split"),
        (["--variance", "diagonal"], "expected variance 'tied', 'row', 'full' or 'rank-K'"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    out = tmp_path / "run"
    assert message in fail("fit", "ss-ig", *TINY, *options, "--out", out)
    # No training took place, and the folder can be used at the next attempt.
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("command", [["fit", "ss-igh"], ["compare", "ss-ig", "ss-igh"]])
def test_unknown_model(tmp_path, command):
    message = fail(*command, *TINY, "--out", tmp_path / "run")
    assert "unknown model 'ss-igh'. Did you mean ss-ig" in message
    assert not (tmp_path / "run").exists()


def test_missing_data_root(tmp_path):
    arguments = ["fit", "ss-ig", "--data", "mnist", "--out", tmp_path / "run"]
    message = fail(*arguments)
    assert "--data-root" in message
    assert "--download" in message
    message = fail(*arguments, "--data-root", tmp_path / "none")
    assert "MNIST" in message
    assert "train-images-idx3-ubyte" in message
    assert not (tmp_path / "run").exists()


def test_bad_table(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("1.0,2.0\n3.0,nan\n")
    assert str(file) in fail("fit", "ss-ig", "--data", f"csv:{file}", "--out", tmp_path / "run")
    missing = tmp_path / "none.csv"
    assert "none.csv" in fail("fit", "dense", "--data", f"csv:{missing}", "--out", tmp_path / "run")


def test_a_folder_that_holds_a_run(run, tmp_path):
    before = (run / "summary.json").read_bytes()
    assert "already holds a run" in fail("fit", "dense", *TINY, "--out", run)
    assert (run / "summary.json").read_bytes() == before
    # compare looks at its folder before it trains anything.
    assert "already holds a comparison" in fail("compare", "ss-ig", *TINY, "--out", run.parent)
    assert not (run.parent / "dense").exists()


def test_nothing_selected_is_a_result(tmp_path):
    out = tmp_path / "run"
    forceful = ["--inclusion-lr", "5", "--kl-start", "1", "--inclusion-probability", "1e-9"]
    output = succeed("fit", "ss-ig", *TINY, *forceful, "--out", out)
    assert "Nothing is selected: layer 'fc1' keeps no unit" in output
    summary = read(out / "summary.json")
    assert summary["kept"] == {"fc1": 0}
    assert (summary["params_compact"], summary["macs_compact"]) == (10, 0)
    assert summary["max_abs_diff_masked_compact"] < 1e-5
    assert "Nothing is selected" in (out / "report.html").read_text()
    succeed("analyse", out, "--draws", "2")
    assert "nothing to export" in fail("export", out, "--out", tmp_path / "small")
    # compare tells, and goes on with the others.
    output = succeed("compare", "ss-ig", *TINY, *forceful, "--out", tmp_path / "runs")
    assert "ss-ig: Nothing is selected" in output
    assert [s["model"] for s in read(tmp_path / "runs" / "compare.json")] == ["ss-ig", "dense"]


def test_names_of_a_table_are_everywhere(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 2, generator=generator).tolist()
    sites = ["left", "right", "middle"]
    lines = [f"{a:.4f},{sites[i % 3]},{b:.4f},{a + b:.4f}" for i, (a, b) in enumerate(rows)]
    file, out = tmp_path / "t.csv", tmp_path / "runs"
    file.write_text("\n".join(["AGE,SITE,BMI,RISK", *lines]))
    options = ["--net", "mlp:4", "--epochs", "2", "--prune-inputs", "--seeds", "2"]
    output = succeed("fit", "ss-ig", "--data", f"csv:{file}", *options, "--out", out)
    first = output.splitlines()[0]
    assert "target RISK (regression, " in first
    assert "5 inputs of 3 columns, 46/2/12 rows" in first
    one = out / "seed-0"
    for name in ("data.json", "summary.json", "report.html"):
        for word in ("RISK", "AGE", "SITE", "BMI"):
            assert word in (one / name).read_text(), name
    variables = read(one / "summary.json")["inputs"]
    assert {row["variable"]: row["inputs"] for row in variables} == {"AGE": 1, "SITE": 3, "BMI": 1}
    output = succeed("analyse", one, "--draws", "2", "--members", "2")
    assert all(word in output for word in ("AGE", "SITE", "BMI", "prior"))
    output = succeed("analyse", out, "--draws", "2")
    assert all(word in output for word in ("AGE", "SITE", "BMI", "prior"))
    assert "SITE" in (out / "report.html").read_text()
    succeed("export", one, "--out", tmp_path / "small", "--no-bench", "--rule", "median:0.01")
    config = read(tmp_path / "small" / "config.json")
    assert config["metadata"]["target"] == "RISK"
    names = ["AGE", "SITE=left", "SITE=middle", "SITE=right", "BMI"]
    assert [one["name"] for one in config["preprocessing"]["columns"]] == names
    assert "SITE=left" in (tmp_path / "small" / "README.md").read_text()


def test_exports_that_cannot_be(run, tmp_path):
    assert "holds no run" in fail("export", tmp_path, "--out", tmp_path / "small")
    assert "not empty" in fail("export", run, "--out", run)
    assert "threshold" in fail("export", run, "--out", tmp_path / "small", "--rule", "median:1.5")
    assert "would keep none" in fail(
        "export", run, "--out", tmp_path / "small", "--rule", "median:0.9999"
    )
    assert "Did you mean median" in fail(
        "export", run, "--out", tmp_path / "small", "--rule", "medan"
    )
    assert "multiplicative noise" in fail("export", run, "--out", tmp_path / "x", "--rule", "snr")
    assert "'--draws'" in fail("export", run, "--out", tmp_path / "small", "--draws", "0")
    nowhere = tmp_path / "nowhere"
    message = fail("export", run, "--out", tmp_path / "small", "--dense", nowhere)
    assert f"{nowhere} holds no finished run" in message
    assert not (tmp_path / "small").exists()


@pytest.mark.usefixtures("drawn_pictures")
def test_explain_lists_groups_and_draws_them(tmp_path):
    text = succeed("explain", "--net", "resnet20", "--picture", tmp_path / "groups.png")
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:4] == ["group", "kind", "units", "row"]
    assert ["conv", "conv", "16", "3071"] in [line[:4] for line in lines]
    assert "no: units of the network's output" in text
    assert (tmp_path / "groups.png").stat().st_size > 10_000
    assert "expected a shape such as" in fail("explain", "--net", "mlp:4", "--input", "3-4")


def test_onnx_that_is_not_installed(run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    message = fail("export", run, "--out", tmp_path / "small", "--onnx")
    assert message == "Error: ONNX files need onnx: pip install 'pyro-sparse[onnx]'"
    assert not (tmp_path / "small").exists()


def test_what_cannot_be_timed(run, tmp_path):
    assert "holds neither a run nor an exported network" in fail("bench", tmp_path)
    assert "'--batches'" in fail("bench", run, "--batches", "1,many")
    assert "batch sizes of at least 1" in fail("bench", run, "--batches", "0")
    assert "'--threads'" in fail("bench", run, "--threads", "0")
    assert "positive number of seconds" in fail("bench", run, "--seconds", "-1")
    assert not (run / "bench.json").exists()
    export.save(mlp([3, 2]), tmp_path / "third", example=torch.zeros(1, 3))
    assert "does not say which full-size network" in fail("bench", tmp_path / "third")
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in fail("bench", tmp_path)


# -- going on --------------------------------------------------------------------------------------


def test_resume(tmp_path):
    # Nothing there yet: it starts. Finished: it is left alone.
    out = tmp_path / "run"
    succeed("fit", "ss-ig", *TINY, "--out", out, "--resume")
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert "run folder" in succeed("fit", "ss-ig", *TINY, "--out", out, "--resume")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == written
    message = fail("fit", "ss-ig", *TINY, "--epochs", "9", "--seed", "3", "--out", out, "--resume")
    assert "--epochs was 2, is 9; --seed was 0, is 3" in message
    assert "go on with --resume" in fail("fit", "ss-ig", *TINY, "--out", out)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path, monkeypatch, signum, code):
    from pyro_sparse.infer.training import Training

    step = Training.step

    def signalling(self, x, y):
        if len(self.run.history) == 1 and self.running.steps == 3:
            os.kill(os.getpid(), signum)
        return step(self, x, y)

    monkeypatch.setattr(Training, "step", signalling)
    out = tmp_path / "run"
    result = call("fit", "ss-ig", *TINY, "--out", out)
    assert result.exit_code == code
    last = result.output.strip().splitlines()[-1]
    name = signal.Signals(signum).name
    assert last.startswith(f"stopped by {name} in epoch 2 of 2, after step 4; go on in {out} with")
    monkeypatch.undo()
    whole = tmp_path / "whole"
    succeed("fit", "ss-ig", *TINY, "--out", whole)
    succeed("fit", "ss-ig", *TINY, "--out", out, "--resume")
    summaries = [read(folder / "summary.json") for folder in (out, whole)]
    for summary in summaries:
        del summary["train_seconds"], summary["seconds_per_epoch"]
    assert summaries[0] == summaries[1]


def test_the_best_checkpoint(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    succeed("analyse", run, "--checkpoint", "best", "--draws", "2", "--members", "2")
    assert read(run / "analysis.json")["checkpoint"] == "best"
    succeed("export", run, "--checkpoint", "best", "--out", tmp_path / "best", "--no-bench")
    succeed("export", run, "--out", tmp_path / "last", "--no-bench")
    chosen = [read(tmp_path / one / "config.json")["metadata"] for one in ("best", "last")]
    assert [one["checkpoint"] for one in chosen] == ["best", "last"]


def test_fit_on_two_devices(tmp_path):
    """Two processes make one run: one table, one line an epoch; and it may be resumed."""
    program = Path(sysconfig.get_path("scripts")) / "pyro-sparse"
    command = [sys.executable, str(program), "fit", "ss-gl", *TINY, "--out", str(tmp_path / "run")]
    command += ["--devices", "2", "--accelerator", "cpu", "--strategy", "ddp"]

    def run(*more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run().count("run folder:") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["max_abs_diff_masked_compact"] <= 1e-5
    (tmp_path / "run" / "report.html").unlink()
    run("--resume")
    assert (
        read(tmp_path / "run" / "summary.json")["accuracy_compact"] == summary["accuracy_compact"]
    )


def test_fit_in_mixed_precision(tmp_path):
    out = tmp_path / "run"
    succeed("fit", "ss-gl", *TINY, "--out", out, "--precision", "bf16-mixed")
    assert read(out / "config.json")["precision"] == "bf16-mixed"
    assert read(out / "summary.json")["max_abs_diff_masked_compact"] <= 1e-5
    message = fail("fit", "ss-gl", *TINY, "--out", tmp_path / "b", "--precision", "16-mixed")
    assert "on the CPU use 'bf16-mixed'" in message
    assert not (tmp_path / "b").exists()
