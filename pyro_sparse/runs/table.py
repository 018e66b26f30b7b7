"""Several runs side by side: means over seeds, standard errors, and paired tests.

The rows of a comparison are its entries (a model with its settings), the columns `COLUMNS`; what a
run does not have, such as an inclusion probability of a dense network, leaves its cell empty.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pyro_sparse.names import UNDECIDED

__all__ = [
    "CALIBRATION",
    "COLUMNS",
    "SCORES",
    "SECTIONS",
    "Cell",
    "Column",
    "Section",
    "Table",
    "by_entry",
    "merged_units",
    "tabulate",
    "variables_table",
]


@dataclass(frozen=True)
class Column:
    """One number of a run.

    Attributes:
        key: in summary.json.
        title: for a heading.
        form: of a value, such as ``{:.2%}``.
        better: 1 where more is better, −1 where less is, 0 where neither is: no test then.
    """

    key: str
    title: str
    form: str
    better: int = 0

    def value(self, summary: Mapping[str, Any], of: str = "") -> float | None:
        """The number of one run, or None; with ``of="_error"`` its standard error."""
        value = summary.get(self.key + of)
        return None if value is None else float(value)

    def text(self, values: Mapping[str, Any], of: str = "") -> str:
        """The number under this key, followed by ``_of`` where given, in its form."""
        return self.form.format(values[f"{self.key}_{of}" if of else self.key])


SCORES = (
    Column("accuracy", "accuracy", "{:.2%}", 1),
    Column("rmse", "RMSE", "{:.4g}", -1),
    Column("nll", "NLL", "{:.3f}", -1),
    Column("ece", "ECE", "{:.3f}", -1),
)
"""On the test set; a summary has each of the ensemble and of the compact network."""

CALIBRATION = (
    Column("brier", "Brier score", "{:.4f}"),
    Column("ece", "ECE", "{:.4f}"),
    Column("entropy", "entropy (nats)", "{:.4f}"),
    Column("mutual_information", "mutual information (nats)", "{:.4f}"),
    Column("crps", "CRPS", "{:.4g}"),
    Column("coverage_50", "50 % interval holds", "{:.1%}"),
    Column("coverage_80", "80 % interval holds", "{:.1%}"),
    Column("coverage_90", "90 % interval holds", "{:.1%}"),
    Column("coverage_95", "95 % interval holds", "{:.1%}"),
    Column("width_95", "its mean width", "{:.4g}"),
)
"""What analysis.json says of a predictor's calibration."""

_OF = {"ensemble": "ens.", "compact": "comp."}

COLUMNS = (
    *(
        Column(f"{score.key}_{of}", f"{score.title} {short}", score.form, score.better)
        for score in SCORES
        for of, short in _OF.items()
    ),
    Column("elbo", "ELBO", "{:.3f}", 1),
    Column("importance_weighted_elbo", "IW-ELBO", "{:.3f}", 1),
    Column("gradient_variance", "gradient variance", "{:.2g}", -1),
    Column("gradient_noise", "gradient noise", "{:.2g}", -1),
    Column("params_compact", "parameters", "{:,.0f}", -1),
    Column("macs_compact", "MACs", "{:,.0f}", -1),
    Column("latency_torch_ms", "torch ms", "{:.4f}", -1),
    Column("latency_onnx_ms", "ONNX ms", "{:.4f}", -1),
    Column("train_seconds", "seconds", "{:.3g}", -1),
)
"""ELBO and IW-ELBO are nats per training example at KL weight 1, latencies those of the compact
network at batch 1."""


@dataclass(frozen=True)
class Section:
    """Columns that are shown together: all of them in one row are wider than any page.

    Attributes:
        title: heading.
        keys: of `COLUMNS`, or ``kept`` and ``undecided``, which are by layer.
        note: what the columns mean.
    """

    title: str
    keys: tuple[str, ...]
    note: str


SECTIONS = (
    Section(
        "How good",
        tuple(f"{score.key}_{of}" for score in SCORES for of in _OF),
        "Test set; ens.: mean of posterior draws, of classes at a temperature that was fitted on "
        "validation rows; comp.: the one pruned network that is shipped. "
        "NLL: negative log-likelihood, nats per example; ECE: expected calibration error.",
    ),
    Section(
        "How small, how fast",
        (
            *("kept", "undecided", "params_compact", "macs_compact"),
            *("latency_torch_ms", "latency_onnx_ms", "train_seconds"),
        ),
        f"Kept and undecided (inclusion probability between {UNDECIDED[0]} and {UNDECIDED[1]}): "
        "units by layer. "
        "Milliseconds: the compact network, one input, one thread. Seconds: of training.",
    ),
    Section(
        "How well the guide fits",
        ("elbo", "importance_weighted_elbo", "gradient_variance", "gradient_noise"),
        "Bounds on the log evidence: nats per training example, KL weight 1, exact discrete mass; "
        "IW: 10 draws a bound. They compare models of the same data and likelihood. None where "
        "there is no evidence: priors that are improper, weights that are point estimates. After "
        "pruning they pay for the choice of what is left (every size of a support is as probable "
        "as any other, and every support of a size). Gradient: trace of its covariance over draws "
        "on one batch, and that over the squared norm of its mean.",
    ),
)


@dataclass(frozen=True)
class Cell:
    """A number over the seeds of an entry.

    Attributes:
        mean: over seeds.
        standard_error: sd / √seeds; of one seed that of its draws or test rows, where the run says,
            None elsewhere.
        p_value: of the paired t-test against the baseline, Holm-adjusted over the entries of the
            column; None where there is nothing to test.
    """

    mean: float
    standard_error: float | None = None
    p_value: float | None = None

    def text(self, form: str, sign: str = " ± ") -> str:
        """``mean ± s.e.``, with a star where p < 0.05."""
        text = form.format(self.mean)
        if self.standard_error:  # none for one seed, 0 for what never varies
            text += sign + form.format(self.standard_error).removesuffix("%")
        return text + "*" * (self.p_value is not None and self.p_value < 0.05)


@dataclass(frozen=True)
class Table:
    """What `tabulate` makes of runs.

    Attributes:
        rows: cells by the columns' keys, by entry, in the order of the runs.
        seeds: of every entry.
        columns: those that any run has.
        baseline: the entry that the others are tested against.
        trained: networks and epochs of the runs.
        layers: ``kept`` and ``undecided``: means over seeds by layer, as ``12-9``, by entry.
        jobs: most runs that shared the machine in training.
    """

    rows: dict[str, dict[str, Cell]]
    seeds: dict[str, list[int]]
    columns: tuple[Column, ...]
    baseline: str
    trained: str
    layers: dict[str, dict[str, str]]
    jobs: int = 1

    def section(
        self, section: Section, sign: str = " ± "
    ) -> tuple[list[str], dict[str, list[str]]]:
        """Titles of the section's columns that any run has, and their cells as text by entry.

        ``mean ± s.e.``, a star where p < 0.05, a dash where there is nothing.
        """
        known = {column.key: column for column in self.columns}
        keys = [key for key in section.keys if key in known or key in self.layers]
        titles = [known[key].title if key in known else key for key in keys]
        lines = {}
        for entry, cells in self.rows.items():
            lines[entry] = [
                self.layers[key][entry]
                if key in self.layers
                else cells[key].text(known[key].form, sign)
                if key in cells
                else "–"
                for key in keys
            ]
        return titles, lines

    @property
    def subtitle(self) -> str:
        """What all runs share: networks, epochs and seeds."""
        seeds = sorted({seed for own in self.seeds.values() for seed in own})
        plural = "s" if len(seeds) > 1 else ""
        return f"{self.trained}, seed{plural} {', '.join(map(str, seeds))}"

    @property
    def footnote(self) -> str:
        """What ± and stars mean here, and what the seconds are of; often empty."""
        parts = []
        several = [len(seeds) > 1 for seeds in self.seeds.values()]
        cells = [cell for row in self.rows.values() for cell in row.values()]
        if not any(several) and any(cell.standard_error for cell in cells):
            parts.append("±: standard error by the test set's rows, of bounds by the draws.")
        if any(several):
            parts.append("±: standard error over seeds.")
            if len(self.rows) > 1:
                parts.append(
                    f"*: differs from {self.baseline} (paired t-test over seeds, p < 0.05 after "
                    "Holm's correction over the column)."
                )
        if self.jobs > 1:
            parts.append(f"Seconds: with up to {self.jobs} runs at a time on the machine.")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "baseline": self.baseline,
            "rows": [
                {
                    "entry": entry,
                    "seeds": self.seeds[entry],
                    **{key: texts[entry] for key, texts in self.layers.items()},
                    **{key: asdict(cell) for key, cell in cells.items()},
                }
                for entry, cells in self.rows.items()
            ],
        }


Summary = TypeVar("Summary", bound=Mapping[str, Any])


def by_entry(summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Runs by what they are called in a comparison: their model, with settings of its own."""
    entries: dict[str, list[Summary]] = {}
    for summary in summaries:
        entries.setdefault(summary.get("entry", summary["model"]), []).append(summary)
    return entries


def merged_units(
    groups: Iterable[Mapping[str, Any]], sign: str = " ± "
) -> tuple[list[str], list[list[str]]]:
    """Titles and a row a layer of what seeds.json says of the units.

    In all, in some: inclusion probability > ½ in so many runs. Expected: number of units that are
    in. Largest s.e.: of the inclusion probability of a unit.
    """
    rows = [
        [
            group["group"],
            str(group["units"]),
            str(group["always"]),
            str(group["sometimes"]),
            f"{group['expected']:.1f}{sign}{group['standard_error']:.1f}",
            f"{group['largest_error']:.3f}",
        ]
        for group in groups
    ]
    return ["layer", "units", "in all", "in some", "expected", "largest s.e."], rows


def variables_table(
    variables: Iterable[Mapping[str, Any]], sign: str = " ± "
) -> tuple[list[str], list[list[str]]]:
    """Titles, and a row a variable of `experiment.inputs_by_name`."""
    rows = []
    for one in variables:
        error = "" if one["error"] is None else f"{sign}{one['error']:.3f}"
        rows.append([one["variable"], f"{one['probability']:.3f}{error}", f"{one['prior']:.3f}"])
    return ["variable", "inclusion probability", "prior"], rows


def tabulate(summaries: Sequence[Mapping[str, Any]], baseline: str | None = None) -> Table:
    """Means over seeds, standard errors and paired tests.

    Runs are paired by their seeds, which share data, batches and the network's initial weights; the
    test is Student's two-sided t on the differences of at least two shared seeds (with the
    three to five seeds that one can afford, no test of ranks could ever reach 5 %). p-values are
    adjusted by Holm's method over the entries of a column, not over columns. Where all differences
    are the same number, as of MACs that never vary, there is no test.

    Args:
        summaries: of runs, as in compare.json; at least one.
        baseline: entry to test against; the first one when absent.

    Raises:
        ValueError: no run is of the baseline.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    entries = {
        entry: {one["seed"]: one for one in runs} for entry, runs in by_entry(summaries).items()
    }
    first = next(iter(entries))
    baseline = first if baseline is None else baseline
    if baseline not in entries:
        raise ValueError(f"expected a baseline among {', '.join(entries)}, got {baseline!r}")
    rows: dict[str, dict[str, Cell]] = {entry: {} for entry in entries}
    columns = []
    for column in COLUMNS:
        values = {
            entry: {
                seed: value
                for seed, one in runs.items()
                if (value := column.value(one)) is not None and math.isfinite(value)
            }
            for entry, runs in entries.items()
        }
        if not any(values.values()):
            continue
        columns.append(column)
        p_values = {}
        if column.better:
            p_values = {
                entry: p
                for entry, own in values.items()
                if entry != baseline and (p := _paired_p(own, values[baseline])) is not None
            }
        adjusted = holm(p_values)
        for entry, own in values.items():
            if own:
                several = list(own.values())
                error: float | None
                if several[1:]:
                    error = statistics.stdev(several) / math.sqrt(len(several))
                else:
                    (seed,) = own
                    error = column.value(entries[entry][seed], "_error")
                rows[entry][column.key] = Cell(
                    statistics.fmean(several), error, adjusted.get(entry)
                )
    return Table(
        rows=rows,
        seeds={entry: list(runs) for entry, runs in entries.items()},
        columns=tuple(columns),
        baseline=baseline,
        trained=", ".join(
            " and ".join(dict.fromkeys(f"{one[key]}{unit}" for one in summaries))
            for key, unit in (("net", ""), ("epochs", " epochs"))
        ),
        layers={
            key: {entry: _by_layer(list(runs.values()), key) for entry, runs in entries.items()}
            for key in ("kept", "undecided")
        },
        jobs=max(one.get("jobs", 1) for one in summaries),
    )


def _by_layer(summaries: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean counts of units, layer by layer."""
    names = dict.fromkeys(name for one in summaries for name in one[key])
    means = [statistics.fmean(one[key].get(name, 0) for one in summaries) for name in names]
    return "-".join(f"{mean:.4g}" if len(summaries) == 1 else f"{mean:.3g}" for mean in means)


def _paired_p(values: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if len(set(differences)) < 2:
        return None
    from scipy.stats import t

    # As scipy's ttest_rel, which warns of differences that are nearly the same.
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return float(2 * t.sf(abs(statistics.fmean(differences)) / error, len(differences) - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm-adjusted p-values: the i-th smallest of m times m − i + 1, made monotone, at most 1."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    ordered: Iterable[tuple[str, float]] = sorted(p_values.items(), key=lambda item: item[1])
    for rank, (name, p) in enumerate(ordered):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted
