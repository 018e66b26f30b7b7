"""``kill -9`` at random moments of the command line: the run ends as if it never was killed."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

# Says when everything is imported, so that kills hit the run and not the start of Python.
COMMAND = """
import pyro_sparse.runs.experiment, lightning_fabric
from pyro_sparse.runs.cli import main
print("ready", flush=True)
main()
"""


def start(out, *options):
    command = [
        *(sys.executable, "-c", COMMAND, "fit", "bmr", "--data", "digits", "--net", "mlp:12"),
        *("--batch-size", 64, "--pretrain", 2, "--passes", 1, "--lr", 0.03, "--scale-lr", 0.03),
        *("--quiet", "--out", out, *options),
    ]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def epochs_done(folder):
    """Of pretraining, training and pruning passes."""
    return sum(path.read_text().count("\n") for path in folder.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("kills", "epochs"),
    [
        pytest.param(3, 5, marks=pytest.mark.slow),
        pytest.param(20, 200, marks=pytest.mark.kills),
    ],
)
def test_it_ends_as_if_it_had_never_been_killed(kills, epochs, tmp_path, outcome):
    options = ("--epochs", epochs)
    process = start(tmp_path / "whole", *options)
    began = time.monotonic()
    while process.poll() is None and not list(tmp_path.rglob("metrics.jsonl")):
        time.sleep(0.01)
    startup = time.monotonic() - began
    finish(process)
    training = time.monotonic() - began - startup
    total = epochs_done(tmp_path / "whole")
    out = tmp_path / "killed"
    moments = random.Random(0)
    lines, seen = [], set()
    for _ in range(kills):
        # At most half of what is left, as the machine may have been slower before; often before
        # the first epoch ends.
        done = epochs_done(out)
        most = done + (total - done) // 2
        process = start(out, *options, "--resume")
        moment = time.monotonic() + moments.uniform(0, startup + training / kills)
        while time.monotonic() < moment and epochs_done(out) < most:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        metrics = sorted(out.rglob("metrics.jsonl"))
        lines.append(sum(len(path.read_text().splitlines()) for path in metrics))
        seen.update(path.parent.name for path in metrics)
    print(f"{kills} kills of {training:.0f} s; epochs done at each: {lines}; in {sorted(seen)}")
    assert lines[-1] > 0  # some were in the midst of training
    assert lines == sorted(lines)  # and no epoch that was done is lost
    finish(start(out, *options, "--resume"))
    assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path, outcome):
    """No file may grow beyond 20 kB, so the first checkpoint cannot be written."""
    out = tmp_path / "run"
    process = subprocess.run(
        [
            *(sys.executable, "-m", "pyro_sparse.runs.cli", "fit", "ss-ig", "--data", "digits"),
            *("--net", "mlp:30", "--epochs", "1", "--quiet", "--out", str(out)),
        ],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("Error: cannot write")
    assert os.strerror(errno.EFBIG) in process.stderr
    assert "Traceback" not in process.stderr
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["lock"]
    # The run goes on once there is room.
    whole = tmp_path / "whole"
    for folder in (out, whole):
        subprocess.run(
            [
                *(sys.executable, "-m", "pyro_sparse.runs.cli", "fit", "ss-ig", "--data", "digits"),
                *("--net", "mlp:30", "--epochs", "1", "--quiet", "--resume", "--out", str(folder)),
            ],
            capture_output=True,
            check=True,
        )
    assert outcome(out) == outcome(whole)
