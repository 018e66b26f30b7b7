"""report.html: all that a run knows, in one file that fetches nothing; tables as CSV and LaTeX."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from pyro_sparse.posterior import plots
from pyro_sparse.runs import page
from pyro_sparse.runs.table import by_entry, tabulate

VOID = {"meta", "img"}


class Checker(HTMLParser):
    """Collects tags, their attributes and text; refuses tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.stack, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def summary(model="ss-ghs", **changes):
    return {
        "model": model,
        "net": "mlp:40-30",
        "data": "digits",
        "seed": 3,
        "epochs": 15,
        "params_dense": 4180,
        "params_compact": 1045,
        "macs_dense": 4100,
        "macs_compact": 1000,
        "units": {"fc1": 40, "fc2": 30},
        "kept": {"fc1": 12, "fc2": 9},
        "undecided": {"fc1": 2, "fc2": 0},
        "train_seconds": 12.3,
        "seconds_per_epoch": 0.8,
        "max_abs_diff_masked_compact": 1.2e-6,
        "accuracy_ensemble": 0.9612,
        "accuracy_compact": 0.9534,
        "nll_ensemble": 0.12345,
        "nll_compact": 0.23456,
        "ece_ensemble": 0.01,
        "ece_compact": 0.02,
        **changes,
    }


def regression(**changes):
    scores = {"rmse_ensemble": 54.25, "rmse_compact": 55.5, "nll_ensemble": 5.4, "nll_compact": 5.5}
    one = {k: v for k, v in summary(**changes).items() if not k.startswith(("accuracy", "ece"))}
    return one | scores


def folder_of(path, one, **files):
    (path / "figures").mkdir(parents=True)
    for name, value in {"summary": one, "config": {"lr": 0.1, "rule": None}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    page.write_figure(path / "figures" / "training.png", lambda ax: ax.plot([1, 2]))
    return path


def check_self_contained(file):
    text = file.read_text()
    html = Checker(text)
    assert "script" not in dict(html.tags)
    assert not re.search(r"(?i)https?:|url\(|@import|\bon\w+=|<link", text)
    for tag, attrs in html.tags:
        if tag == "img":
            assert attrs["src"].startswith("data:image/png;base64,iVBOR")
            assert attrs["alt"]
    policies = [a["content"] for _, a in html.tags if "Content-Security-Policy" in a.values()]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert text.count("<div class=scroll") == text.count("<table>")
    return html


def test_page_of_a_run(tmp_path):
    file = page.write_run(folder_of(tmp_path / "run", summary()))
    assert file == tmp_path / "run" / "report.html"
    html = check_self_contained(file)
    for word in (
        *("ss-ghs on digits", "mlp:40-30, 15 epochs, seed 3", "95.34%", "96.12%", "0.235"),
        *("21 of 70", "4.1×", "1,000", "4,180", "fc2", "1.2e-06", "rule", "–"),
    ):
        assert word in html.text, word
    assert len([tag for tag, _ in html.tags if tag == "img"]) == 1
    assert "How far to believe it" not in html.text
    assert not list(tmp_path.rglob("*.tmp"))


def test_page_of_a_regression_with_analysis(tmp_path):
    calibration = {"crps": 30.25, "coverage_50": 0.5, "coverage_95": 0.9437, "draws": 1}
    point = {"kept": {"fc1": 5}, "params": 111, "macs": 99, "rmse": 61.5, "nll": 5.7}
    group = {"group": "fc1", "units": 9, "kept": 5, "expected": 5.25, "low": 4, "high": 7}
    analysis = {
        "calibration": {"ensemble": calibration, "members": {**calibration, "draws": 7}},
        "groups": [{**group, "undecided": 2, "entropy": 1.5}, {**group, "expected": None}],
        "measure": "inclusion probability",
        "score": "rmse",
        "curve": [{**point, "own": True}, {**point, "own": False, "macs": 77}],
    }
    file = page.write_run(folder_of(tmp_path / "run", regression(), analysis=analysis))
    text = check_self_contained(file).text
    for word in ("55.5", "94.4%", "30.25", "7 compact networks drawn", "5.2 (4–7)", "61.5"):
        assert word in text, word
    assert text.count("(the run's)") == 1
    assert "accuracy" not in text
    assert "ECE" not in text


def test_names_cannot_become_markup(tmp_path):
    one = summary(data="<script>alert(1)</script>", net='a"b&c')
    html = check_self_contained(page.write_run(folder_of(tmp_path / "run", one)))
    assert "<script>alert(1)</script>" in html.text


def test_a_run_that_is_not_finished(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished run \(no summary\.json\)"):
        page.write_run(tmp_path)


def test_page_and_tables_of_a_comparison(tmp_path):
    runs = [summary(), summary("dense", macs_compact=4100, accuracy_compact=0.97, path=[1])]
    folder_of(tmp_path / "ss-ghs", runs[0])
    html = check_self_contained(page.write_comparison(tmp_path, runs, tabulate(runs)))
    assert "2 models on digits" in html.text
    # The Pareto plot and the one picture of ss-ghs; dense has none and says so.
    assert len([tag for tag, _ in html.tags if tag == "img"]) == 2
    assert "No figures were written" in html.text
    # What no run has measured has no section, and one seed no errors.
    assert "How well the guide fits" not in html.text
    assert "±" not in html.text
    with (tmp_path / "compare.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["model"] == "ss-ghs"
    assert float(first["nll_compact"]) == 0.23456
    assert first["kept"] == "12-9"
    assert second["macs_compact"] == "4100"
    lines = (tmp_path / "compare.tex").read_text().splitlines()
    assert lines.count(r"\begin{tabular}{lrrrrrr}") == 1
    assert lines.count(r"\begin{tabular}{lrrrrr}") == 1
    good, small = [line for line in lines if line.startswith("ss-ghs")]
    assert good.count(" & ") == 6
    assert r"& 95.34\% &" in good
    assert small == r"ss-ghs & 12-9 & 2-0 & 1,045 & 1,000 & 12.3 \\"
    assert lines.count(r"\end{tabular}") == 2


def test_page_of_a_comparison_over_seeds(tmp_path):
    runs = [
        summary(entry=entry, run=f"{entry}/seed-{seed}", seed=seed, accuracy_compact=score)
        for entry, scores in {"ss-ghs": (0.9, 0.94), "ss-ghs:lr=1": (0.92, 0.97)}.items()
        for seed, score in enumerate(scores)
    ]
    for run in runs:
        folder_of(tmp_path / run["run"], run)
    html = check_self_contained(page.write_comparison(tmp_path, runs, tabulate(runs)))
    assert "seeds 0, 1" in html.text
    assert "92.00% ± 2.00" in html.text
    assert "94.50% ± 2.50" in html.text
    assert "differs from ss-ghs (paired t-test" in html.text
    # Pictures of the first seed of each, which is said; the other seeds have their own pages.
    assert len([tag for tag, _ in html.tags if tag == "img"]) == 3
    assert html.text.count("Seed 0:") == 2
    assert r"92.00\% $\pm$ 2.00" in (tmp_path / "compare.tex").read_text()


def test_page_of_several_seeds(tmp_path):
    runs = [
        summary(run=f"seed-{seed}", seed=seed, accuracy_ensemble=score)
        for seed, score in enumerate((0.9, 0.94))
    ]
    html = check_self_contained(page.write_seeds(tmp_path, runs))
    for word in ("ss-ghs on digits, 2 seeds", "seeds 0, 1", "seed-1", "92.00% ± 2.00", "12-9"):
        assert word in html.text, word
    assert "What the seeds agree on" not in html.text
    group = {"group": "fc1", "units": 40, "always": 7, "sometimes": 3, "largest_error": 0.25}
    merged = {
        "draws": 20,
        "scores": {"accuracy_ensemble": {"mean": 0.92, "standard_error": 0.02}},
        "mixture": {"accuracy": 0.953},
        "groups": [{**group, "expected": 8.5, "standard_error": 0.5}],
        "inputs": {"selected": [3, 11], "said": "Inputs within a rate of 5 %: 3, 11."},
    }
    (tmp_path / "seeds.json").write_text(json.dumps(merged))
    page.write_figure(tmp_path / "figures" / "co_inclusion.png", lambda ax: ax.plot([1, 2]))
    html = check_self_contained(page.write_seeds(tmp_path, runs))
    for word in ("95.30%", "What the seeds agree on", "8.5 ± 0.5", "0.250", "5 %: 3, 11"):
        assert word in html.text, word
    assert len([tag for tag, _ in html.tags if tag == "img"]) == 1


def test_latex_special_characters():
    assert page._latex(r"a_b & 5% {x}^2\~#$") == (
        r"a\_b \& 5\% \{x\}\textasciicircum{}2\textbackslash{}\textasciitilde{}\#\$"
    )


def test_accuracy_against_cost_joins_the_best():
    points = {"a": (100, 0.90), "b": (200, 0.95), "c": (300, 0.93), "d": (400, 0.97)}
    runs = [summary(n, macs_compact=m, accuracy_compact=a) for n, (m, a) in points.items()]
    ax = Figure().subplots()
    assert plots.accuracy_against_cost(by_entry(runs), ax) is ax
    front = ax.lines[-1]
    assert list(front.get_xdata()) == [100, 200, 400]
    assert list(front.get_ydata()) == [0.90, 0.95, 0.97]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(points)
    # Of errors, the smaller one is better.
    errors = [
        {**regression(model=n, macs_compact=m), "rmse_compact": 1 - a}
        for n, (m, a) in points.items()
    ]
    ax = Figure().subplots()
    plots.accuracy_against_cost(by_entry(errors), ax)
    assert list(ax.lines[-1].get_xdata()) == [100, 200, 400]


def test_accuracy_against_cost_of_several_seeds():
    """Small points of the seeds, and a front through the means."""
    points = {"a": [(100, 0.90), (300, 0.94)], "b": [(400, 0.95), (600, 0.97)]}
    runs = [
        summary(entry=n, seed=seed, macs_compact=m, accuracy_compact=a)
        for n, values in points.items()
        for seed, (m, a) in enumerate(values)
    ]
    ax = plots.accuracy_against_cost(by_entry(runs), Figure().subplots())
    front = ax.lines[-1]
    assert front.get_xdata() == pytest.approx([200, 500])
    assert front.get_ydata() == pytest.approx([0.92, 0.96])
    assert ax.collections[0].get_offsets().tolist() == [[100, 0.90], [300, 0.94]]
    assert len(ax.get_legend().get_texts()) == 2


def test_accuracy_size_curve():
    curve = [
        {"macs": macs, "accuracy": score, "own": own}
        for macs, score, own in ((300, 0.9, False), (100, 0.7, False), (200, 0.8, True))
    ]
    ax = Figure().subplots()
    assert plots.accuracy_size_curve(curve, "accuracy", ax) is ax
    assert list(ax.lines[0].get_xdata()) == [100, 200, 300]
    assert ax.collections[0].get_offsets().tolist() == [[200, 0.8]]
