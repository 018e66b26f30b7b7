"""Any models, with any settings, on any data, over several seeds: `compare`.

An entry is a model's name, with settings of its own where it has any: ``ss-ghs`` beside
``ss-ghs:variance=full`` compares two guides of one model. Every entry is trained with every seed;
runs of one seed share data, batches and the network's initial weights, so that differences can be
tested in pairs (:mod:`pyro_sparse.runs.table`).
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_sparse import infer, nets
from pyro_sparse.data import Dataset, load
from pyro_sparse.export.latency import ONNX, TORCH, time_alone
from pyro_sparse.posterior import Posterior, importance_weighted_elbo, log_weights
from pyro_sparse.runs import page, zoo
from pyro_sparse.runs.experiment import (
    Constant,
    PruningError,
    load_data,
    posterior_of,
    prepare,
    pruned_network,
    run,
    run_keep,
)
from pyro_sparse.runs.parallel import Failed, call_in_processes
from pyro_sparse.runs.settings import OF_TABLES, SIZES, Settings, parse_entry, settings_for
from pyro_sparse.runs.table import Table, tabulate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Comparison", "compare", "entry_settings", "latency", "measure", "run_seeds"]

MOST_MACS = 2e11
"""Multiplications over all training examples above which a draw of the joint density is too dear to
be repeated as often as bounds need."""
DRAWS, LEAST_DRAWS = 100, 30
"""Draws for bounds, and how few they may be where each is dear."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` returns; ``str()`` prints its tables.

    Attributes:
        runs: summaries of all runs, as in compare.json.
        table: means over seeds, with standard errors and paired tests.
        out: folder of everything.
    """

    runs: list[dict[str, Any]]
    table: Table
    out: Path

    def __str__(self) -> str:
        from rich.console import Console

        from pyro_sparse.runs import terminal

        text = io.StringIO()
        terminal.print_comparison(self.runs[0]["data"], self.table, Console(file=text, width=140))
        return text.getvalue()


def entry_settings(
    entry: str, data: str | Dataset, root: str | Path | None = None, **shared: Any
) -> Settings:
    """Settings of an entry: its own ones, then the shared ones that its model takes, then defaults.

    Args:
        entry: see :func:`~pyro_sparse.runs.settings.parse_entry`.
        data: the data, or their name.
        root: folder of the data's files.
        **shared: settings and options; None counts as not given.

    Raises:
        ValueError: the model or a setting is not known, or the model does not take one of its own.
    """
    model, own = parse_entry(entry)
    settings_for(model, data, root=root, strict=True, **own)
    chosen = settings_for(model, data, root=root, **{**shared, **own})
    # None is a value here: "rule=none" overrides a shared rule.
    nothing = {name for name, value in own.items() if value is None}
    without: dict[str, Any] = dict.fromkeys(
        nothing - chosen.model_options.keys() - chosen.guide_options.keys()
    )
    return dataclasses.replace(
        chosen,
        model_options={k: None if k in nothing else v for k, v in chosen.model_options.items()},
        guide_options={k: None if k in nothing else v for k, v in chosen.guide_options.items()},
        **without,
    )


def compare(
    entries: Sequence[str | Settings],
    data: str | Dataset,
    out: str | Path,
    *,
    seeds: int = 1,
    baseline: str | None = None,
    measured: bool = True,
    jobs: int = 1,
    root: str | Path | None = None,
    download: bool = False,
    resume: bool = False,
    progress: bool = True,
    on_data: Callable[[Dataset], object] | None = None,
    **shared: Any,
) -> Comparison:
    """Train every entry with every seed, each in its run folder, and tabulate all of them.

    Run folders are ``out/ENTRY``, or ``out/ENTRY/seed-K`` with several seeds. After each run are
    written compare.json (the summaries of all runs), compare.csv (the same, a line a run),
    table.json and compare.tex (means, standard errors, tests), figures/ and report.html. Seeds are
    the outer loop: the first one gives a whole table. Latencies are measured last, one network
    after another. A model that cannot be pruned is left out, and its run folder stays.

    With ``jobs`` above 1 so many runs are trained at a time, each in a process of its own on one
    torch thread. The numbers are those of one run after the other on one thread, but for the
    seconds, which the tables say. A run that fails stops none of the others.

    Args:
        entries: names with settings, see :func:`~pyro_sparse.runs.settings.parse_entry`, or whole
            `Settings`; one a name. Reference pruners without a budget come last, and get the median
            of the MACs that the others of their seed keep.
        data: a name that :func:`pyro_sparse.data.load` knows, or the data.
        out: the new folder, or with ``resume`` one that holds a part of this comparison.
        seeds: how many, counted from the settings' ``seed``.
        baseline: the entry that the others are tested against; the first when absent.
        measured: whether to add what `measure` and `latency` find.
        jobs: runs at a time; more than the machine's cores make none of them faster. Scripts need
            the usual ``if __name__ == "__main__":`` then.
        root: folder of the data's files.
        download: fetch data that are missing.
        resume: go on with a comparison that was stopped, or add entries or seeds to one; what is
            finished is read.
        progress: show progress.
        on_data: called with the data of the first run, before training, to say what they are.
        **shared: settings for all entries, and options for those whose model or guide takes them.

    Raises:
        ValueError: before any training, where ``out`` already holds runs or an entry is wrong.
        PruningError: no run could be pruned.
        ChildProcessError: with ``jobs``, when all others are finished: a run failed.
    """
    out = Path(out)
    if seeds < 1:
        raise ValueError(f"expected at least one seed, got {seeds}")
    if jobs < 1:
        raise ValueError(f"expected at least one job, got {jobs}")
    source = (
        data
        if not isinstance(data, str) or data in SIZES
        else load(
            data,
            root,
            download=download,
            **{name: shared[name] for name in OF_TABLES if shared.get(name) is not None},
        )
    )
    chosen: dict[str, Settings] = {}
    for entry in entries:
        label = entry if isinstance(entry, str) else entry.model
        if label in chosen:
            raise ValueError(f"the entry {label!r} is there twice")
        chosen[label] = (
            entry_settings(entry, source, root, **shared) if isinstance(entry, str) else entry
        )
    if not chosen:
        raise ValueError("expected at least one entry to compare")
    if baseline is not None and baseline not in chosen:
        raise ValueError(f"expected a baseline among {', '.join(chosen)}, got {baseline!r}")
    places = {label: _folder(label) for label in chosen}
    if len(set(places.values())) < len(places):
        raise ValueError(f"expected entries with different folders, got {', '.join(places)}")
    if not resume and (
        (out / "compare.json").exists()
        or any(
            list((out / place).glob(pattern))
            for place in places.values()
            for pattern in ("config.json", "seed-*/config.json")
        )
    ):
        raise ValueError(
            f"{out} already holds a comparison; choose another folder with --out, or go on with "
            "--resume"
        )

    known: dict[tuple[int, float, int], Dataset] = {}

    def loaded(settings: Settings) -> Dataset:
        """The data of a run, read once for all entries of a seed that share them."""
        if not isinstance(data, str):
            return data
        key = settings.seed, settings.validation, settings.split
        if key not in known:
            for other in [other for other in known if other[0] != settings.seed]:
                del known[other]
            known[key] = load_data(settings, root, download)
        return known[key]

    for label, one in chosen.items():
        try:
            prepare(one, loaded(one))
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    if on_data is not None:
        on_data(loaded(next(iter(chosen.values()))))
    # Reference pruners come last: their budget is what the others need.
    ordered = sorted(chosen, key=lambda label: _wants_budget(chosen[label]))
    plan = {}
    for offset in range(seeds):
        for label in ordered:
            one = dataclasses.replace(chosen[label], seed=chosen[label].seed + offset)
            place = places[label] if seeds == 1 else f"{places[label]}/seed-{one.seed}"
            plan[place] = _Run(label, one, out, place, measured, resume, jobs)

    outcomes: dict[str, dict[str, Any] | Exception] = {}

    def ended(runs: Mapping[str, _Run]) -> Iterator[str]:
        """Train these; their places, as their outcomes come."""
        if jobs == 1:
            for place, one in runs.items():
                if progress:
                    print(one.title(seeds), flush=True)
                outcomes[place] = one.finish(loaded(one.settings), progress)
                yield place
            return
        sent = root if isinstance(data, str) else pickle.dumps(data)
        calls = [(one, sent) for one in runs.values()]
        try:
            for index, outcome in call_in_processes(_finish_elsewhere, calls, jobs):
                place = list(runs)[index]
                outcomes[place] = outcome
                if progress:
                    count = f"{len(outcomes)} of {len(plan)}"
                    print(f"{count}: {runs[place].title(seeds)}", flush=True)
                yield place
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped after {len(outcomes)} of {len(plan)} runs; go on in {out} with "
                "resume=True, on the command line with --resume"
            ) from None

    def finished() -> list[dict[str, Any]]:
        return [one for place in plan if isinstance(one := outcomes.get(place), dict)]

    failed = []
    for last in (False, True):
        runs = {place: one for place, one in plan.items() if _wants_budget(one.settings) is last}
        if last:
            runs = {place: one.with_budget_of(finished()) for place, one in runs.items()}
            plan |= runs
        for place in ended(runs):
            outcome = outcomes[place]
            if isinstance(outcome, dict):
                _write(out, finished(), baseline)
                continue
            # The others still have something to say; this one's run folder stays.
            name = plan[place].name(seeds)
            print(f"{name}: {outcome}", flush=True)
            if isinstance(outcome, Failed):
                failed.append(f"{name}: {outcome}")
    summaries = finished()
    if failed:
        raise ChildProcessError(
            f"{'; '.join(failed)}. The other runs are kept in {out}; go on with --resume"
        )
    if not summaries:
        raise PruningError(f"no model could be pruned; the runs are kept under {out}")
    if measured:
        for summary in summaries:
            if "latency_torch_ms" not in summary:
                trained = plan[summary["run"]]
                dataset = loaded(trained.settings)
                summary |= latency(trained.settings, trained.posterior(dataset), dataset)
                infer.write_json(out / trained.place / "summary.json", summary)
    return Comparison(summaries, _write(out, summaries, baseline), out)


@dataclasses.dataclass(frozen=True)
class _Run:
    """One entry with one seed.

    Attributes:
        entry: its name.
        settings: of the run.
        out: the comparison's folder.
        place: the run folder below it.
        measured, resume, jobs: see `compare`.
    """

    entry: str
    settings: Settings
    out: Path
    place: str
    measured: bool
    resume: bool
    jobs: int

    def name(self, seeds: int) -> str:
        """In a message."""
        return self.entry if seeds == 1 else f"{self.entry}, seed {self.settings.seed}"

    def title(self, seeds: int) -> str:
        """Where it is on."""
        if self.entry not in zoo.ZOO:
            return self.name(seeds)
        return self.name(seeds).replace(self.entry, zoo.find(self.entry).title)

    def with_budget_of(self, others: Iterable[Mapping[str, Any]]) -> _Run:
        """The run of a reference pruner that may keep as much as the others of its seed do."""
        macs = [
            other["macs_compact"]
            for other in others
            if other["seed"] == self.settings.seed and zoo.find(other["model"]).bayesian
        ]
        budget = float(statistics.median(macs)) if macs else None
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, budget=budget))

    def posterior(self, dataset: Dataset) -> Posterior:
        """What has been trained."""
        return posterior_of(self.out / self.place, self.settings, dataset)

    def finish(self, dataset: Dataset, progress: bool) -> dict[str, Any] | PruningError:
        """Train it and write its folder; the summary, or why it cannot be pruned."""
        folder = self.out / self.place
        try:
            summary = run(
                self.settings, folder, dataset=dataset, resume=self.resume, progress=progress
            )
        except PruningError as error:
            return error
        summary |= {"entry": self.entry, "run": self.place}
        summary.setdefault("jobs", self.jobs)
        if self.measured and "gradient_variance" not in summary:
            summary |= measure(self.settings, self.posterior(dataset), dataset)
        infer.write_json(folder / "summary.json", summary)
        return summary


def _finish_elsewhere(one: _Run, source: str | Path | bytes | None) -> Any:
    """`_Run.finish` in another process: of pickled data, or of those that lie below a folder."""
    if not isinstance(source, bytes):
        return one.finish(load_data(one.settings, source), progress=False)
    return one.finish(pickle.loads(source), progress=False)


def _write(out: Path, summaries: list[dict[str, Any]], baseline: str | None) -> Table:
    """All files of a comparison but the run folders."""
    entries = {summary["entry"] for summary in summaries}
    table = tabulate(summaries, baseline if baseline in entries else None)
    infer.write_json(out / "compare.json", summaries)
    infer.write_json(out / "table.json", table.to_dict())
    page.write_comparison(out, summaries, table)
    return table


def _folder(label: str) -> str:
    """A name for a folder: nothing in it that a path or a shell would read."""
    return re.sub(r"[^\w.=+-]+", "-", label)


def _wants_budget(settings: Settings) -> bool:
    """Whether a run is a pruner to compare with, whose budget is that of the others."""
    return bool(settings.passes) and not zoo.find(settings.model).bayesian and not settings.budget


def run_seeds(
    settings: Settings,
    out: str | Path,
    seeds: int,
    *,
    root: str | Path | None = None,
    download: bool = False,
    resume: bool = False,
    progress: bool = True,
    on_data: Callable[[Dataset], object] | None = None,
    fabric: Fabric | None = None,
) -> list[dict[str, Any]]:
    """One model with several seeds, each in the run folder ``out/seed-K``; returns the summaries.

    Writes ``out/report.html`` of them all, which `analysis.analyse_seeds` adds to. Arguments as of
    `compare` and :func:`~pyro_sparse.runs.experiment.run`.

    Raises:
        ValueError: before any training, where ``out`` is taken or the settings are wrong.
    """
    out = Path(out)
    chosen = [dataclasses.replace(settings, seed=settings.seed + k) for k in range(seeds)]
    taken = [out / f"seed-{one.seed}" for one in chosen]
    for folder in (out, *taken):
        if (folder / "config.json").exists() and (folder == out or not resume):
            raise ValueError(f"{folder} already holds a run; choose another folder with --out")
    summaries = []
    for one, folder in zip(chosen, taken, strict=True):
        dataset = load_data(one, root, download)
        if on_data is not None and one is chosen[0]:
            on_data(dataset)
        if progress:
            print(f"seed {one.seed}", flush=True)
        summary = run(one, folder, dataset=dataset, resume=resume, progress=progress, fabric=fabric)
        summaries.append({**summary, "run": folder.name})
        if fabric is None or fabric.is_global_zero:
            page.write_seeds(out, summaries)
    return summaries


# -- what a run does not say of itself -------------------------------------------------------------


def measure(
    settings: Settings, posterior: Posterior, dataset: Dataset, draws: int | None = None
) -> dict[str, float]:
    """What `compare` adds to a run's summary, of the final guide.

    - ``elbo``, ``importance_weighted_elbo`` (10 draws a bound): nats per training example, at KL
      weight 1, with the guide's exact discrete mass, each with the standard error ``…_error`` of
      the draws. Where weights or units were pruned, less what their choice costs. Only where there
      is an evidence, see :func:`~pyro_sparse.infer.without_evidence`, and not above `MOST_MACS`.
    - ``gradient_variance`` and ``gradient_noise`` (the former over the squared norm of the mean):
      see :func:`~pyro_sparse.infer.gradient_variance`; on the first batch of the training data,
      with the run's estimator.

    Args:
        settings: of the run.
        posterior: of the run.
        dataset: its data.
        draws: for bounds; at most `DRAWS` when absent, fewer of large data.
    """
    model, guide, train = posterior.model, posterior.guide, dataset.train
    found: dict[str, float] = {}
    macs = nets.count_macs(model.net, train.x[:1]) * len(train)
    if macs <= MOST_MACS and infer.without_evidence(model, guide, train.x[:2]) is None:
        draws = draws or max(LEAST_DRAWS, min(DRAWS, int(5 * MOST_MACS / macs)))
        with torch.random.fork_rng([]):
            torch.manual_seed(settings.seed)
            ratios = log_weights(model, guide, train.x, train.y, num_samples=draws)
        for key, k in (("elbo", 1), ("importance_weighted_elbo", 10)):
            found[key], found[f"{key}_error"] = (
                value / len(train) for value in importance_weighted_elbo(ratios, k)
            )
    size = settings.batch_size
    noise = infer.gradient_variance(
        model,
        guide,
        train.x[:size],
        train.y[:size],
        num_particles=settings.num_particles,
        seed=settings.seed,
    )
    found |= {"gradient_variance": noise.total, "gradient_noise": noise.relative}
    return {key: value for key, value in found.items() if math.isfinite(value)}


def latency(settings: Settings, posterior: Posterior, dataset: Dataset) -> dict[str, float]:
    """Milliseconds that the compact network takes for one input, on one thread.

    ``latency_torch_ms``, and ``latency_onnx_ms`` where ONNX Runtime is installed and has all
    operations of the network.

    Args:
        settings: of the run.
        posterior: of the run.
        dataset: its data.
    """
    small = pruned_network(posterior, run_keep(settings, posterior, dataset), dataset.test.x)
    if isinstance(small, Constant):
        return {}
    try:
        timings = time_alone(small, dataset.test.x[:1], seconds=0.25)
    except ValueError:
        # An operation that ONNX does not have; the summary is complete without it.
        return {}
    keys = {TORCH: "latency_torch_ms", ONNX: "latency_onnx_ms"}
    return {keys[timing.runtime]: 1e3 * timing.median for timing in timings}
