"""report.html: one self-contained page of a run, of seeds or of a comparison; CSV and LaTeX.

A page is a function of the JSON files and pictures in its folder, so it can be written again
whenever one of them is new. Pictures are embedded, the style is inline, there is no script and
nothing is fetched: the file can be sent by mail. It reads on a phone, where wide tables scroll in
their own box, and in print.
"""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_sparse.infer import read_json, write_text
from pyro_sparse.names import UNDECIDED
from pyro_sparse.posterior import plots
from pyro_sparse.runs.table import (
    CALIBRATION,
    SCORES,
    SECTIONS,
    Cell,
    Column,
    Table,
    by_entry,
    merged_units,
    tabulate,
    variables_table,
)
from pyro_sparse.templating import render

__all__ = ["write_comparison", "write_figure", "write_run", "write_seeds"]

Part = Mapping[str, Any]
"""One of heading, text, facts, table or figures, as templates/report.html has them."""

CAPTIONS = {
    "pareto": "Score against cost: filled, the compact network that is shipped; hollow, the "
    "ensemble of posterior draws. The line joins compact networks that no other one beats in both.",
    "training": "Evidence lower bound and log-likelihood per training example over epochs.",
    "inclusion": "Posterior inclusion probability of every unit, sorted; those in the shaded band "
    "are undecided.",
    "strips": "Inclusion probabilities as strips, a layer each.",
    "network": "The network before and after: units that are kept, and weights at posterior means; "
    "the larger, the less transparent.",
    "fields": "Weights of the first layer's kept units as images, each scaled to its largest "
    "weight. Orange is positive, purple negative.",
    "noise": "Signal-to-noise ratio and mean of each unit's multiplicative noise.",
    "units": "Units of each layer over epochs.",
    "free_energy": "Free energy along passes of pruning and training.",
    "calibration": "Predicted against observed: how far the probabilities can be believed.",
    "inclusion_over_seeds": "Inclusion probability of every unit, mean over seeds with two "
    "standard errors; hidden units of different seeds are matched first.",
    "co_inclusion": "Pairs of units that are in together more often (orange) or less often "
    "(purple) over seeds than if they were independent.",
    "size": "The compact network at other numbers of units, by the same measure of importance; all "
    "on the test set, none is selected by it.",
}

NOT_NUMBERS = ("path", "inputs", "objective", "notes", "taken", "classes", "said", "cautions")
"""Of a summary: what a line of compare.csv cannot hold."""

NETWORKS = {
    "ensemble": "ensemble of posterior draws",
    "compact": "compact network (shipped)",
    "members": "compact networks drawn",
}


# -- a run -----------------------------------------------------------------------------------------


def write_run(folder: Path) -> Path:
    """Write report.html from config.json, summary.json, figures/ and, if there, analysis.json.

    Raises:
        FileNotFoundError: the folder has no finished run.
    """
    summary, settings = _json(folder / "summary.json"), _json(folder / "config.json")
    analysis = _json(folder / "analysis.json") if (folder / "analysis.json").is_file() else None
    title = f"{summary['model']} on {summary['data']}"
    below = (
        f"{summary['net']}, {summary['epochs']} epochs, seed {summary['seed']}, "
        f"{summary['train_seconds']:.0f} seconds of training"
    )
    options = settings.pop("model_options", {}) | settings.pop("guide_options", {})
    parts = [
        _facts(summary),
        *_run_sections(summary, analysis),
        _heading("Figures"),
        _figures(folder / "figures"),
        _heading("Settings"),
        _table(
            ["setting", "value"],
            [[key, _plain(value)] for key, value in {**settings, **options}.items()],
        ),
    ]
    return _write(folder / "report.html", title, below, parts)


def _run_sections(summary: Mapping[str, Any], analysis: Mapping[str, Any] | None) -> list[Part]:
    columns = _scores_in(summary, "compact")
    rows = [
        [NETWORKS[which], *(column.text(summary, which) for column in columns)]
        for which in ("ensemble", "compact")
    ]
    size = [
        [
            title,
            f"{summary[f'{key}_dense']:,}",
            f"{summary[f'{key}_compact']:,}",
            _ratio(summary[f"{key}_dense"], summary[f"{key}_compact"]),
        ]
        for key, title in (("params", "parameters"), ("macs", "MACs for one input"))
    ]
    difference = summary["max_abs_diff_masked_compact"]
    low, high = UNDECIDED
    parts = [
        *([_text(summary["taken"])] if summary.get("taken") else []),
        *(_text(note, soft=True) for note in summary.get("notes", [])),
        *([_text(summary["said"])] if summary.get("said") else []),
        *map(_text, summary.get("cautions", [])),
        *_variables(summary.get("inputs"), summary.get("objective")),
        _heading("How good"),
        _table(["", *(column.title for column in columns)], rows, _on_the_test_set(columns)),
        _heading("How small"),
        _table(["", "dense", "compact", "ratio"], size),
        _units(summary, f"Undecided: inclusion probability between {low} and {high}."),
        _text(
            "The full-size network with the other units switched off computes the same: "
            f"largest difference {difference:.1e}.",
            soft=True,
        ),
    ]
    return parts if analysis is None else parts + _analysis_sections(analysis)


def _variables(
    variables: Sequence[Mapping[str, Any]] | None, objective: str | None = None
) -> list[Part]:
    """Which variables matter, where inputs are selected."""
    if not variables:
        return []
    titles, rows = variables_table(variables)
    note = (
        "Probability that the variable is in, under the posterior and under the prior. One with "
        "categories or missing values is in where any of its inputs is."
    )
    note += f" {objective[0].upper()}{objective[1:]}." if objective else ""
    return [_heading("Which variables matter"), _table(titles, rows, note)]


def _analysis_sections(analysis: Mapping[str, Any]) -> list[Part]:
    calibration = analysis["calibration"]
    columns = [one for one in CALIBRATION if any(one.key in row for row in calibration.values())]
    rows = [
        [
            f"{row['draws']} {NETWORKS[which]}" if which == "members" else NETWORKS[which],
            *(column.text(row) for column in columns),
        ]
        for which, row in calibration.items()
    ]
    expected = [
        [
            group["group"],
            str(group["units"]),
            str(group["kept"]),
            f"{group['expected']:.1f} ({group['low']}–{group['high']})",
            str(group["undecided"]),
            f"{group['entropy']:.2f}",
        ]
        for group in analysis["groups"]
        if group["expected"] is not None
    ]
    (score,) = (one for one in SCORES if one.key == analysis["score"])
    curve = analysis["curve"]
    points = [
        [
            f"{sum(point['kept'].values())}" + (" (the run's)" if point["own"] else ""),
            "-".join(str(kept) for kept in point["kept"].values()),
            f"{point['params']:,}",
            f"{point['macs']:,}",
            score.text(point),
            f"{point['nll']:.4f}",
        ]
        for point in curve
    ]
    titles = [column.title for column in columns]
    parts = [_heading("How far to believe it"), _table(["", *titles], rows)]
    if analysis.get("outside"):
        outside = analysis["outside"]
        parts.append(
            _text(
                f"Inputs of {outside['data']} are told from the test set by entropy with an "
                f"AUROC of {outside['auroc_entropy']:.3f}, by mutual information with "
                f"{outside['auroc_mutual_information']:.3f} (½ is chance)."
            )
        )
    if expected:
        parts += [
            _heading("How sure about the units"),
            _table(
                ["layer", "units", "kept", "expected (95 %)", "undecided", "entropy (nats)"],
                expected,
                "Expected: of the number of units that are in, under the posterior.",
            ),
        ]
    return [
        *parts,
        _heading("Other sizes"),
        _table(
            ["units", "by layer", "parameters", "MACs", score.title, "NLL"],
            points,
            f"Compact networks of the units with the largest {analysis['measure']}, test set.",
        ),
    ]


def _facts(summary: Mapping[str, Any]) -> Part:
    kept, units = sum(summary["kept"].values()), sum(summary["units"].values())
    score = _scores_in(summary, "compact")[0]
    facts = [
        (score.text(summary, "compact"), f"{score.title}, compact network"),
        (score.text(summary, "ensemble"), f"{score.title}, ensemble"),
        (f"{kept} of {units}", "units kept"),
        (_ratio(summary["macs_dense"], summary["macs_compact"]), "fewer MACs than dense"),
    ]
    return {"facts": facts}


# -- several seeds ---------------------------------------------------------------------------------


def write_seeds(folder: Path, summaries: Sequence[Mapping[str, Any]]) -> Path:
    """Write report.html of several runs of one model, from their summaries and seeds.json.

    Args:
        folder: to write into; seeds.json and figures/ are there after `analysis.analyse_seeds`.
        summaries: of the runs, at least one, each with its ``run`` folder's name.
    """
    merged = _json(folder / "seeds.json") if (folder / "seeds.json").is_file() else None
    table, first = tabulate(summaries), summaries[0]
    title = f"{first['model']} on {first['data']}, {len(summaries)} seeds"
    scores = _scores_in(first, "compact")
    rows = [
        [
            str(summary["run"]),
            *(score.text(summary, of) for score in scores for of in ("compact", "ensemble")),
            "-".join(map(str, summary["kept"].values())),
            "-".join(map(str, summary["undecided"].values())),
            f"{summary['macs_compact']:,}",
            f"{summary['train_seconds']:.0f}",
        ]
        for summary in summaries
    ]
    heads = [f"{score.title} {of}" for score in scores for of in ("compact", "ensemble")]
    parts = [
        *([] if merged is None else _merged_sections(merged)),
        *_comparison_sections(table),
        _heading("Run by run"),
        _table(
            ["run", *heads, "kept", "undecided", "MACs", "seconds"],
            rows,
            f"{_on_the_test_set(scores)} Every run folder has a report of its own.",
        ),
    ]
    if merged is not None and merged["groups"]:
        parts += [_heading("Figures"), _figures(folder / "figures")]
    return _write(folder / "report.html", title, table.subtitle, parts)


def _merged_sections(merged: Mapping[str, Any]) -> list[Part]:
    """What seeds.json says: scores of all draws together, and what the seeds agree on."""
    scores = [score for score in SCORES if score.key in merged["mixture"]]
    one = merged["scores"]
    rows = [
        [
            "one run",
            *(Cell(**one[f"{score.key}_ensemble"]).text(score.form) for score in scores),
        ],
        ["draws of all runs", *(score.text(merged["mixture"]) for score in scores)],
    ]
    parts = [
        _heading("Draws of all runs together"),
        _table(
            ["ensemble of", *(score.title for score in scores)],
            rows,
            f"{merged['draws']} draws a run. ±: standard error over runs.",
        ),
    ]
    titles, units = merged_units(merged["groups"])
    if units:
        parts += [
            _heading("What the seeds agree on"),
            _table(
                titles,
                units,
                "Hidden units of different runs are matched. In all, in some: inclusion "
                "probability > ½. Expected: number of units that are in; largest s.e.: of the "
                "inclusion probability of a unit.",
            ),
        ]
    if merged["inputs"] is not None:
        parts.append(_text(merged["inputs"]["said"]))
        parts += _variables(merged["inputs"].get("variables"))
    return parts


# -- a comparison ----------------------------------------------------------------------------------


def write_comparison(folder: Path, summaries: Sequence[Mapping[str, Any]], table: Table) -> Path:
    """Write report.html, compare.csv, compare.tex and figures/pareto.png of several runs.

    Args:
        folder: holds the run folders, each where its summary's ``run`` says.
        summaries: of the runs; at least one.
        table: of them.
    """
    first = summaries[0]
    _write_csv(folder / "compare.csv", summaries)
    _write_latex(folder / "compare.tex", table)
    figures = folder / "figures"
    # Of a network that is a constant there are none, which a logarithm cannot show.
    shown = [{**one, "macs_compact": max(1, one["macs_compact"])} for one in summaries]
    entries = by_entry(shown)
    write_figure(figures / "pareto.png", lambda ax: plots.accuracy_against_cost(entries, ax))
    title = f"{len(entries)} model{'s' if len(entries) > 1 else ''} on {first['data']}"
    parts = [
        *_comparison_sections(table),
        _heading("Accuracy against cost" if "accuracy_compact" in first else "Error and cost"),
        {"figures": [_figure(figures / "pareto.png")]},
    ]
    for entry, runs in by_entry(summaries).items():
        own = folder / runs[0].get("run", entry)
        parts += [
            _heading(entry),
            *([_text(f"Seed {runs[0]['seed']}:", soft=True)] if len(runs) > 1 else []),
            _facts(runs[0]),
            _units(runs[0]),
            _figures(own / "figures"),
        ]
    return _write(folder / "report.html", title, table.subtitle, parts)


def _comparison_sections(table: Table) -> list[Part]:
    """A table a section, one row an entry."""
    parts = []
    for section in SECTIONS:
        titles, lines = table.section(section)
        if titles:
            rows = [[entry, *cells] for entry, cells in lines.items()]
            parts += [
                _heading(section.title),
                _table(["model", *titles], rows, f"{section.note} {table.footnote}"),
            ]
    return parts


def _write_csv(path: Path, summaries: Sequence[Mapping[str, Any]]) -> None:
    """All numbers, not rounded; counts by layer joined by a hyphen. A line a model."""
    flat = [
        {
            key: "-".join(map(str, value.values())) if isinstance(value, Mapping) else value
            for key, value in summary.items()
            if key not in NOT_NUMBERS
        }
        for summary in summaries
    ]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(flat)


def _write_latex(path: Path, table: Table) -> None:
    """Tabular environments that need no package, one a section."""

    def line(cells: Iterable[str]) -> str:
        return " & ".join(_latex(cell) for cell in cells) + r" \\"

    lines = []
    for section in SECTIONS:
        titles, rows = table.section(section)
        if titles:
            lines += [
                f"% {section.title}",
                rf"\begin{{tabular}}{{l{'r' * len(titles)}}}",
                r"\hline",
                line(["model", *titles]),
                r"\hline",
                *(line([entry, *cells]) for entry, cells in rows.items()),
                r"\hline",
                r"\end{tabular}",
                "",
            ]
    path.write_text("\n".join(lines))


def _latex(text: str) -> str:
    special = {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
    }
    return "".join(special.get(character, character) for character in text)


def write_figure(path: Path, *panels: Callable[[Any], Any]) -> None:
    """A picture in a size that a phone can show: axes that each of ``panels`` draws on, stacked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: its global state belongs to the user. And no savefig, which draws all of it twice.
    figure = Figure(figsize=(5.8, 3.8 * len(panels)), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for draw, ax in zip(panels, figure.subplots(len(panels), squeeze=False).flat, strict=True):
        draw(ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path)


# -- parts of a page -------------------------------------------------------------------------------


def _scores_in(values: Mapping[str, Any], of: str) -> list[Column]:
    return [score for score in SCORES if f"{score.key}_{of}" in values]


def _on_the_test_set(columns: Sequence[Column]) -> str:
    ece = any(column.key == "ece" for column in columns)
    note = "On the test set; NLL: negative log-likelihood, nats per example"
    return note + ("; ECE: expected calibration error, 15 bins." if ece else ".")


def _units(summary: Mapping[str, Any], note: str = "") -> Part:
    rows = [
        [name, str(size), str(summary["kept"][name]), str(summary["undecided"][name])]
        for name, size in summary["units"].items()
    ]
    return _table(["layer", "units", "kept", "undecided"], rows, note)


def _ratio(dense: float, compact: float) -> str:
    return f"{dense / compact:.1f}×" if compact else "–"


def _plain(value: Any) -> str:
    return "–" if value is None else str(value)


def _heading(text: str) -> Part:
    return {"heading": text}


def _text(text: str, soft: bool = False) -> Part:
    return {"text": text, "soft": soft}


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> Part:
    return {"titles": titles, "rows": rows, "note": note}


def _figures(folder: Path) -> Part:
    """All pictures of a folder, those that have a caption first and in its order."""
    found = {path.stem: path for path in sorted(folder.glob("*.png"))}
    ordered = [*(name for name in CAPTIONS if name in found), *(set(found) - set(CAPTIONS))]
    return {"figures": [_figure(found[name]) for name in ordered]}


def _figure(path: Path) -> tuple[str, str]:
    """A picture as text, and what is to be seen."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return data, CAPTIONS.get(path.stem, path.stem.replace("_", " "))


def _json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no finished run (no {path.name})")
    return read_json(path)


def _write(path: Path, title: str, below: str, parts: Sequence[Part]) -> Path:
    write_text(path, render("report.html", title=title, below=below, parts=parts))
    return path
