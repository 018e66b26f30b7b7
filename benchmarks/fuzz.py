"""Damaged, truncated and hostile files: is each refused in words of ours, or read as what it was?

Every case takes one file of an export, a checkpoint, a run folder or a table, changes it at random,
and reads it as a user would. Right is an error of ours that names the file, or what was there.
Wrong: an error from the depths, other numbers without a word, more memory than `BOUND`, code run.

    python -m benchmarks.fuzz --cases 100000

The cases are the same for a seed. A finding has a number: ``--only NUMBER`` repeats it.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyro_sparse as ps
from pyro_sparse.infer import checkpoint
from pyro_sparse.runs import experiment
from pyro_sparse.runs.settings import settings_for

ROOT = Path(__file__).parents[1]
OWN = tuple(f"{ROOT / folder}/" for folder in ("pyro_sparse", "models", "guides"))
BOUND = 2 * 2**30
"""Bytes of memory that the whole process may grow by."""
WORDS = (
    *("null", "[]", "{}", "-1", "1e999", "NaN", '"../../etc/passwd"', '"os:abort"', "1" * 400),
    *("[" * 3000, '"\\ud800"', "true", '"\\u0000"', "99999999999999999999", "0.1e-400"),
)
PIECES = (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b'"', b",,", b"=cmd|", b"\xc3\x28", b"inf")


def changed(content: bytes, rng: random.Random) -> bytes:
    """One random change: a bit, a piece, a cut, a number, a JSON value, a size."""
    kind = rng.randrange(8)
    place = rng.randrange(len(content))
    if kind == 0:
        return (
            content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        )
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + rng.choice(PIECES) + content[place:]
    if kind == 3:
        end = min(len(content), place + rng.randrange(1, 200))
        return content[:place] + content[end:]
    if kind == 4:
        end = min(len(content), place + rng.randrange(1, 200))
        return content[:place] + content[place:end] * 2 + content[end:]
    if kind == 5:  # the size that a safetensors file declares of its header
        size = struct.pack("<Q", rng.choice([0, 7, 2**31, 2**63 - 1, len(content) * 2]))
        return size + content[8:]
    if kind == 6:
        text = content.decode("utf-8", "replace")
        starts = [i for i, letter in enumerate(text[:20000]) if letter in ":,["]
        if not starts:
            return content[place:]
        start = rng.choice(starts) + 1
        ends = [i for i in (text.find(letter, start) for letter in ",}]\n") if i > 0]
        end = min(ends, default=len(text))
        return (text[:start] + rng.choice(WORDS) + text[end:]).encode("utf-8", "surrogatepass")
    return bytes(rng.randrange(256) for _ in range(rng.randrange(300)))


class Target:
    """A file, and what a user reads out of it, as something that can be compared."""

    def __init__(self, name: str, file: Path, read: Callable[[], Any], *, may_differ: bool) -> None:
        self.name, self.file, self.read, self.may_differ = name, file, read, may_differ
        self.content = file.read_bytes()
        self.was = repr(read())

    def case(self, rng: random.Random) -> str:
        """How it went: the same, refused, or what is wrong."""
        self.file.write_bytes(changed(self.content, rng))
        try:
            found = repr(self.read())
        except (ValueError, OSError, TypeError) as error:
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            if last.startswith(OWN) and not isinstance(error, UnicodeError):
                return "refused"
            return f"from the depths: {type(error).__name__}: {str(error)[:120]}"
        except BaseException as error:
            return f"from the depths: {type(error).__name__}: {str(error)[:120]}"
        finally:
            self.file.write_bytes(self.content)
        if found == self.was:
            return "the same"
        return "read as it is now" if self.may_differ else "silently something else"


def targets(folder: Path) -> list[Target]:
    """One of each kind of file, as this package writes them, and a table."""
    torch.manual_seed(0)
    x, y = torch.randn(80, 4), torch.arange(80) % 2
    model = ps.models.SpikeSlabGaussian(ps.nets.mlp([4, 5, 2]), x[:2], num_data=80)
    guide = ps.guides.for_model(model)
    ps.fit(model, guide, ps.data.Batches(x, y, 40), epochs=1, progress=False, out=folder / "fitted")
    posterior = ps.Posterior(model, guide)
    shipped = folder / "shipped"
    keep = {"fc1": torch.tensor([True, True, False, True, True])}
    mean = {"inputs": {"mean": [0.5, 1.0, -2.0, 3.0], "std": [1.0, 2.0, 3.0, 4.0]}}
    ps.export.save(ps.compact(posterior, keep), shipped, preprocessing=mean)
    run = folder / "run"
    settings = settings_for("ss-ig", "digits", net="mlp:4", epochs=1)
    dataset = experiment.load_data(settings, None)
    experiment.run(settings, run, dataset=dataset, progress=False, figures=False)
    table = folder / "table.csv"
    lines = ["age,height,kind,y"]
    lines += [f"{a:.3f},{b:.2f},{c:.1f},{int(a > 0)}" for a, b, c, _ in x.tolist()]
    table.write_text("\n".join(lines))
    last = folder / "fitted" / "checkpoint" / "last.safetensors"

    def network() -> Any:
        with torch.no_grad():
            return ps.export.load(shipped)(x[:4])

    def rows() -> Any:
        dataset = ps.data.load(f"csv:{table}")
        finite = all(bool(part.x.isfinite().all()) for part in (dataset.train, dataset.test))
        assert finite, "numbers that are not finite"
        return dataset.feature_names, len(dataset.train), float(dataset.train.x.sum())

    def state() -> Any:
        found = checkpoint.load_checkpoint(last)
        return (
            found.header,
            sorted(found.tensors),
            float(sum(v.double().sum() for v in found.tensors.values())),
        )

    return [
        Target("export: config.json", shipped / "config.json", network, may_differ=False),
        Target(
            "export: preprocessing",
            shipped / "config.json",
            lambda: ps.export.read_config(shipped)["preprocessing"],
            may_differ=False,
        ),
        Target("export: weights", shipped / "model.safetensors", network, may_differ=False),
        Target("export: program", shipped / "model.pt2", network, may_differ=False),
        Target("checkpoint", last, state, may_differ=False),
        Target(
            "run: settings",
            run / "config.json",
            lambda: experiment.read_settings(run),
            may_differ=True,
        ),
        Target("table", table, rows, may_differ=True),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print counts and findings; 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one case and print what it did")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    try:
        known = targets(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        findings = 0
        numbers = range(chosen.cases) if chosen.only is None else [chosen.only]
        for number in numbers:
            target = known[number % len(known)]
            outcome = target.case(random.Random(chosen.seed * 10**9 + number))
            kind = outcome.partition(":")[0]
            counts[target.name][kind] += 1
            if kind in ("from the depths", "silently something else"):
                findings += 1
                if counts[target.name][kind] <= 10:
                    print(f"case {number}, {target.name}: {outcome}", flush=True)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        for name, kinds in counts.items():
            print(f"{name:24}", json.dumps(dict(kinds)))
        print(f"{len(numbers)} cases, {findings} findings, memory grew by {grown / 2**20:.0f} MiB")
        return int(findings > 0 or grown > BOUND)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
