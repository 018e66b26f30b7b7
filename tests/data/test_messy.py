"""Messy tables, made of scikit-learn's real sets: read right, or refused in one sentence.

Each case is a table as people have it, and what is right: facts of the data set that comes of it,
or a part of the sentence that refuses it. To add one, write a function that returns a `Case`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine

from pyro_sparse.data import load, tables


@dataclass
class Case:
    """A table, how to read it, and what must come of it.

    Attributes:
        content: of the file, or a frame.
        task, classes, target, features: of the data set.
        rows: of all splits.
        range: of a regression's target.
        said: parts of what must be said.
        refused: a pattern of the refusal; nothing else counts then.
        options: for ``load``.
    """

    content: Any
    task: str = "classification"
    classes: int | None = None
    target: str | None = None
    features: list[str] | None = None
    rows: int | None = None
    range: tuple[float, float] | None = None
    said: tuple[str, ...] = ()
    refused: str = ""
    options: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__.strip("_")] = make
    return make


def iris(rows: int = 150) -> pd.DataFrame:
    """Four lengths and ``y`` in 0, 1, 2; shuffled, without its repeated row."""
    bunch = load_iris(as_frame=True)
    frame = bunch.data.set_axis(["sepal", "sepal width", "petal", "petal width"], axis=1)
    frame["y"] = bunch.target
    return frame.drop_duplicates().sample(frac=1, random_state=0).head(rows).reset_index(drop=True)


def wine() -> pd.DataFrame:
    bunch = load_wine(as_frame=True)
    frame = bunch.data[["alcohol", "malic_acid", "ash", "proline"]].copy()
    frame["cultivar"] = bunch.target
    return frame.sample(frac=1, random_state=0).reset_index(drop=True)


def diabetes() -> pd.DataFrame:
    bunch = load_diabetes(scaled=False, as_frame=True)
    frame = bunch.data[["age", "sex", "bmi", "bp"]].copy()
    frame["progression"] = bunch.target
    return frame


def cancer() -> pd.DataFrame:
    bunch = load_breast_cancer(as_frame=True)
    frame = bunch.data.iloc[:, :5].copy()
    frame["diagnosis"] = np.where(bunch.target == 0, "malignant", "benign")
    return frame


LENGTHS = ["sepal", "sepal width", "petal", "petal width"]
FOUR = ["age", "sex", "bmi", "bp"]


def of_iris(content: Any, **more: Any) -> Case:
    facts = {"classes": 3, "target": "y", "features": LENGTHS, "rows": 149}
    return Case(content, **{**facts, **more})


def of_diabetes(content: Any, **more: Any) -> Case:
    facts = {"target": "progression", "features": FOUR, "rows": 442, "range": (25, 346)}
    return Case(content, task="regression", **{**facts, **more})


def refused(content: Any, pattern: str, **options: Any) -> Case:
    return Case(content, refused=pattern, options=options)


def text(frame: pd.DataFrame, **how: Any) -> str:
    return frame.to_csv(index=False, **how)


# -- how the file is written -----------------------------------------------------------------------


@case
def plain() -> Case:
    return of_iris(text(iris()))


@case
def semicolons() -> Case:
    return of_iris(text(iris(), sep=";"), said=("semicolon",))


@case
def semicolons_and_decimal_commas() -> Case:
    return of_diabetes(text(diabetes(), sep=";", decimal=","), said=("decimal commas",))


@case
def tabs() -> Case:
    return of_iris(text(iris(), sep="\t"), said=("tab",))


@case
def bars() -> Case:
    return of_iris(text(iris(), sep="|"), said=("bar",))


@case
def blanks() -> Case:
    frame = iris().set_axis(["a", "b", "c", "d", "y"], axis=1)
    return of_iris(frame.to_string(index=False), features=list("abcd"), said=("blanks",))


@case
def blanks_after_commas() -> Case:
    return of_iris(text(iris()).replace(",", ", "))


@case
def windows_1252() -> Case:
    frame = iris().rename(columns={"sepal": "Länge"})
    features = ["Länge", *LENGTHS[1:]]
    return of_iris(text(frame).encode("cp1252"), features=features, said=("Windows-1252",))


@case
def utf_8_with_mark() -> Case:
    return of_iris(text(iris()).encode("utf-8-sig"))


@case
def utf_16() -> Case:
    return of_iris(text(iris()).encode("utf-16"), said=("UTF-16",))


@case
def gzipped() -> Case:
    return of_iris(gzip.compress(text(iris()).encode()), said=("gzip",))


@case
def bzipped() -> Case:
    return of_iris(bz2.compress(text(iris()).encode()), said=("bzip2",))


@case
def xzipped() -> Case:
    return of_iris(lzma.compress(text(iris()).encode()), said=("xz",))


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, text(iris()))
    return content.getvalue()


@case
def zip_of_one() -> Case:
    return of_iris(zipped("a.csv"), said=("zip",))


@case
def zip_of_two() -> Case:
    return refused(zipped("a.csv", "b.csv"), "one table in it, got 2 files")


@case
def excel_workbook() -> Case:
    return refused(zipped("[Content_Types].xml", "xl/workbook.xml"), "Excel workbook; save")


@case
def windows_line_ends() -> Case:
    return of_iris(text(iris(), lineterminator="\r\n"))


@case
def comments_above() -> Case:
    return of_iris("# measured in 1935\n# in cm\n" + text(iris()), said=("2 lines of comments",))


@case
def header_as_comment() -> Case:
    return of_iris("# " + text(iris()), said=("names of columns from the comment",))


@case
def blank_lines() -> Case:
    return of_iris("\n\n" + text(iris()).replace("\n", "\n\n", 7) + "\n\n")


@case
def quoted_cells_with_commas() -> Case:
    frame = cancer()
    frame.insert(0, "site", np.where(frame["mean area"] > 600, "left, upper", 'so-called "right"'))
    return Case(
        text(frame), classes=2, target="diagnosis", rows=569, said=("the target is 'diagnosis'",)
    )


@case
def quoted_cells_of_two_lines() -> Case:
    frame = diabetes().astype(object)
    frame.insert(0, "site", ["left\nupper"] * 3 + ["left", "right"] * 219 + ["left"])
    frame.loc[30, "bp"] = "high"
    # A header, thirty rows, and a second line in three of them.
    return refused(text(frame), "line 35, column 'bp': expected a number, got 'high'")


@case
def open_quote() -> Case:
    table = text(iris()).split("\n")
    table[3] = '"' + table[3]
    return refused("\n".join(table), "line 4")


@case
def trailing_commas() -> Case:
    return of_iris(text(iris()).replace("\n", ",\n"), said=("without a name",))


@case
def trailing_commas_below_the_header() -> Case:
    header, rest = text(iris()).split("\n", 1)
    return of_iris(header + "\n" + rest.replace("\n", ",\n"), said=("without a name",))


@case
def row_numbers_of_pandas() -> Case:
    return of_iris(iris().to_csv(), said=("without a name",))


@case
def row_names_of_r() -> Case:
    header, rest = iris().to_csv().split("\n", 1)
    return of_iris(header[1:] + "\n" + rest, said=("without a name",))


@case
def short_line() -> Case:
    lines = text(iris()).split("\n")
    lines[57] = lines[57].rsplit(",", 1)[0]
    return refused("\n".join(lines), "line 58: 4 columns, expected 5")


@case
def long_line_under_comments() -> Case:
    lines = text(iris()).split("\n")
    lines[57] += ",1"
    return refused("# from\n\n" + "\n".join(lines), "line 60: 6 columns, expected 5")


@case
def empty_file() -> Case:
    return refused("", "no rows")


@case
def header_only() -> Case:
    return refused(text(iris(0)), "no rows")


@case
def binary_file() -> Case:
    return refused(bytes(range(256)) * 9, "zero bytes")


@case
def four_rows() -> Case:
    return refused(text(iris(4)), "4 rows are too few")


@case
def one_column() -> Case:
    return refused(text(iris()[["y"]]), "one column")


# -- headers ---------------------------------------------------------------------------------------


@case
def no_header() -> Case:
    return of_iris(text(iris(), header=False), target="5", features=None, said=("last column",))


@case
def no_header_and_text_labels() -> Case:
    frame = iris()
    frame["y"] = frame["y"].map({0: "setosa", 1: "versicolor", 2: "virginica"})
    return of_iris(text(frame, header=False), target="5", features=None)


@case
def years_as_header() -> Case:
    frame = diabetes().set_axis(["2019", "2020", "2021", "2022", "2023"], axis=1)
    features = ["2019", "2020", "2021", "2022"]
    return of_diabetes(text(frame), target="2023", features=features, said=("first line is a",))


@case
def years_among_words() -> Case:
    frame = diabetes().set_axis(["age", "2019", "2020", "2021", "y"], axis=1)
    return of_diabetes(text(frame), target="y", features=["age", "2019", "2020", "2021"])


@case
def inf_in_the_header() -> Case:
    frame = diabetes().set_axis(["age", "inf", "nan", "bp", "y"], axis=1)
    return of_diabetes(text(frame), target="y", features=["age", "inf", "nan", "bp"])


@case
def counted_header() -> Case:
    frame = diabetes().set_axis(range(5), axis=1)
    return of_diabetes(text(frame), target="4", features=["0", "1", "2", "3"])


@case
def header_of_a_table_of_words() -> Case:
    frame = cancer()
    words = pd.DataFrame(
        {
            "size": pd.cut(frame["mean area"], 5, labels=list("abcde")),
            "shape": pd.cut(frame["mean texture"], 4, labels=list("mnop")),
            "diagnosis": frame["diagnosis"],
        }
    )
    return Case(text(words), classes=2, target="diagnosis", rows=569, said=("repeat another",))


@case
def twice_the_same_header() -> Case:
    frame = iris().set_axis(["a", "a", "b", "c", "y"], axis=1)
    return of_iris(text(frame), features=["a", "a.1", "b", "c"], said=("two columns are called",))


# -- targets and tasks -----------------------------------------------------------------------------


@case
def binary_with_points() -> Case:
    frame = cancer().assign(diagnosis=lambda f: (f["diagnosis"] == "benign").astype(float))
    return Case(text(frame), classes=2, target="diagnosis", rows=569)


@case
def minus_and_plus_one() -> Case:
    frame = cancer().assign(diagnosis=lambda f: np.where(f["diagnosis"] == "benign", 1, -1))
    return Case(text(frame), classes=2, target="diagnosis", rows=569)


@case
def target_first() -> Case:
    frame = iris()[["y", *LENGTHS]]
    return of_iris(text(frame), said=("first column, 'y'",))


@case
def target_in_the_middle() -> Case:
    frame = iris()[["sepal", "sepal width", "y", "petal", "petal width"]]
    return of_iris(text(frame), options={"target": "y", "task": "classification"})


@case
def counts() -> Case:
    frame = diabetes()
    visits = np.random.default_rng(0).poisson(np.exp((frame["bmi"] - 26) / 10))
    frame["visits"] = visits
    said = ("whole numbers of the target are taken for numbers", "--task classification")
    features = [*FOUR, "progression"]
    ends = (0, visits.max())
    return of_diabetes(text(frame), target="visits", features=features, range=ends, said=said)


@case
def stars() -> Case:
    frame = diabetes()
    frame["stars"] = pd.qcut(frame.pop("progression"), 5, labels=False) + 1
    said = ("5 whole numbers of the target are taken for numbers",)
    return of_diabetes(text(frame), target="stars", range=(1, 5), said=said)


@case
def counts_called_y() -> Case:
    frame = diabetes()
    frame["y"] = np.random.default_rng(0).poisson(1.0, len(frame))
    features = [*FOUR, "progression"]
    ends = (0, frame["y"].max())
    return of_diabetes(text(frame), target="y", features=features, range=ends, said=("order",))


@case
def stars_as_classes() -> Case:
    frame = diabetes()
    frame["stars"] = pd.qcut(frame.pop("progression"), 5, labels=False) + 1
    options = {"task": "classification"}
    return Case(text(frame), classes=5, target="stars", features=FOUR, rows=442, options=options)


@case
def cultivars() -> Case:
    return Case(text(wine()), classes=3, target="cultivar", rows=178, said=("by its name",))


@case
def classes_as_a_regression() -> Case:
    return of_iris(text(iris()), task="regression", classes=None, options={"task": "regression"})


@case
def numbers_as_classes() -> Case:
    return refused(text(diabetes()), "too many for classes", task="classification")


@case
def words_as_a_regression() -> Case:
    pattern = "line 2, column 'diagnosis': expected a number"
    return refused(text(cancer()), pattern, task="regression")


@case
def one_class() -> Case:
    return refused(text(cancer().assign(diagnosis="benign")), "at least two classes")


@case
def unknown_target() -> Case:
    return refused(text(iris()), "Known: sepal", target="petals")


@case
def targets_that_are_missing() -> Case:
    frame = diabetes()
    frame.loc[[3, 70], "progression"] = np.nan
    return of_diabetes(text(frame), rows=440, said=("2 rows without a target",))


# -- cells -----------------------------------------------------------------------------------------


def with_gaps() -> pd.DataFrame:
    frame = diabetes()
    frame.loc[::9, "bmi"] = np.nan
    return frame


@case
def empty_cells() -> Case:
    features = ["age", "sex=2.0", "bmi", "bmi missing", "bp"]
    features[1] = "sex"
    return of_diabetes(text(with_gaps()), features=features, said=("filled",))


@case
def question_marks() -> Case:
    features = ["age", "sex", "bmi", "bmi missing", "bp"]
    return of_diabetes(text(with_gaps(), na_rep="?"), features=features, said=("filled",))


@case
def gaps_refused() -> Case:
    return refused(text(with_gaps()), "line 2, column 'bmi': a value is missing", missing="refuse")


@case
def word_among_numbers() -> Case:
    frame = diabetes().astype(object)
    frame.loc[30, "bp"] = "high"
    return refused(text(frame), "line 32, column 'bp': expected a number, got 'high'")


@case
def infinite_number() -> Case:
    frame = diabetes()
    frame.loc[30, "bp"] = np.inf
    return refused(text(frame), "line 32, column 'bp': expected a finite number, got 'inf'")


@case
def percents() -> Case:
    frame = diabetes().assign(bp=lambda f: f["bp"].map("{:.2f}%".format))
    return refused(text(frame), r"too many values to be categories: 'bp'.*--drop")


@case
def thousands() -> Case:
    frame = diabetes().assign(bp=lambda f: (1000 * f["bp"]).map("{:,.1f}".format))
    return of_diabetes(text(frame), said=("commas between thousands",))


@case
def commas_of_two_meanings() -> Case:
    frame = diabetes().round(0).astype(int)
    frame["bp"] = (17 * frame["bp"]).map("{:,}".format)
    return refused(text(frame, sep=";"), "may mean")


@case
def names_of_people() -> Case:
    frame = iris()
    frame.insert(0, "name", [f"plant {i}" for i in range(len(frame))])
    return refused(text(frame), r"'name' \(\d+ in \d+ rows")


@case
def names_of_people_dropped() -> Case:
    frame = iris()
    frame.insert(0, "name", [f"plant {i}" for i in range(len(frame))])
    return of_iris(text(frame), options={"drop": ["name"]})


@case
def identifiers() -> Case:
    frame = iris()
    frame.insert(0, "id", range(1001, 1001 + len(frame)))
    return of_iris(text(frame), features=["id", *LENGTHS], said=("'id' looks like an identifier",))


@case
def categories() -> Case:
    frame = diabetes()
    frame["sex"] = frame["sex"].map({1: "f", 2: "m"})
    frame["weight"] = pd.cut(frame.pop("bmi"), 3, labels=["low", "middle", "high"])
    frame["progression"] = frame.pop("progression")
    weights = ["weight=high", "weight=low", "weight=middle"]
    return of_diabetes(text(frame), features=["age", "sex=m", "bp", *weights])


@case
def categories_with_gaps() -> Case:
    frame = diabetes()
    frame["sex"] = frame["sex"].map({1: "f", 2: "m"})
    frame.loc[::11, "sex"] = None
    return of_diabetes(text(frame), features=["age", "sex=f", "sex=m", "sex missing", "bmi", "bp"])


@case
def truths() -> Case:
    frame = diabetes().assign(sex=lambda f: f["sex"] == 1)
    return of_diabetes(text(frame), features=["age", "sex=True", "bmi", "bp"])


@case
def dates() -> Case:
    frame = diabetes()
    days = np.random.default_rng(0).integers(0, 3000, len(frame))
    frame.insert(0, "seen", pd.Timestamp("2015-03-01") + pd.to_timedelta(days, "D"))
    return of_diabetes(text(frame), features=["seen", *FOUR])


@case
def constant_columns() -> Case:
    frame = diabetes()
    frame.insert(0, "site", "Boston")
    frame.insert(2, "version", 3)
    return of_diabetes(text(frame), said=("constant columns are left out: site, version",))


@case
def equal_columns() -> Case:
    frame = diabetes()
    frame.insert(0, "mass", frame["bmi"])
    return of_diabetes(text(frame), features=["mass", *FOUR], said=("'mass' and 'bmi' say",))


@case
def target_among_the_inputs() -> Case:
    frame = diabetes()
    frame.insert(0, "later", frame["progression"])
    return of_diabetes(text(frame), features=["later", *FOUR], said=("is the target itself",))


@case
def repeated_rows() -> Case:
    frame = pd.concat([diabetes(), diabetes().head(60)])
    return of_diabetes(text(frame), rows=502, said=("60 rows repeat another one",))


# -- frames ----------------------------------------------------------------------------------------


@case
def frame() -> Case:
    return of_iris(iris())


@case
def frame_of_pandas_types() -> Case:
    frame = diabetes().astype({"age": "Int64", "progression": "Float64"})
    frame["sex"] = frame["sex"].map({1: "f", 2: "m"}).astype("category")
    frame.loc[::9, "age"] = pd.NA
    frame.insert(0, "seen", pd.Timestamp("2015-03-01") + pd.to_timedelta(frame.index % 300, "D"))
    return of_diabetes(frame, features=["seen", "age", "age missing", "sex=m", "bmi", "bp"])


@case
def frame_of_lists() -> Case:
    frame = diabetes()
    frame.insert(0, "path", [[1, 2]] * len(frame))
    return refused(frame, "column 'path': expected numbers or text in the cells, got list")


@case
def frame_with_an_index() -> Case:
    return of_iris(iris().set_axis(np.arange(149) * 7 + 3, axis=0))


def write(case: Case, folder: Path) -> Any:
    """What `load` is given: the frame, or the name of a file in ``folder``."""
    if isinstance(case.content, pd.DataFrame):
        return case.content
    file = folder / "table.csv"
    content = case.content
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return f"csv:{file}"


# -- what must hold --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    given = write(case, tmp_path)
    if case.refused:
        with pytest.raises(ValueError, match=case.refused) as error:
            load(given, **case.options)
        assert "\n" not in str(error.value)
        return
    data = load(given, **case.options)
    assert (data.task, data.classes, data.target) == (case.task, case.classes, case.target)
    if case.features is not None:
        assert list(data.feature_names) == case.features
        assert data.input_shape == (len(case.features),)
        assert all(f.startswith(v) for f, v in zip(case.features, data.variables, strict=True))
    parts = (data.train, data.validation, data.test)
    if case.rows is not None:
        assert sum(map(len, parts)) == case.rows
    for part in parts:
        assert torch.isfinite(part.x).all()
        assert len(part) > 0
    if case.range is not None:
        facts = data.preprocessing["target"]
        y = torch.cat([part.y for part in parts]) * facts["std"] + facts["mean"]
        assert y.min().item() == pytest.approx(case.range[0], abs=1e-3)
        assert y.max().item() == pytest.approx(case.range[1], abs=1e-3)
    for part_of_a_note in case.said:
        assert any(part_of_a_note in note for note in data.notes), data.notes
    # The columns are those of the table: nothing has slipped by one.
    if case.features == FOUR and case.rows == 442:
        facts = data.preprocessing["inputs"]
        ages = torch.cat([p.x[:, 0].double() for p in parts]) * facts["std"][0] + facts["mean"][0]
        assert np.allclose(np.sort(ages), np.sort(diabetes()["age"]), atol=1e-3)


def test_there_are_sixty() -> None:
    assert len(CASES) >= 60


def test_repeated_rows_stay_in_one_split(tmp_path: Path) -> None:
    case = CASES["repeated_rows"]()
    for seed in range(3):
        data = load(write(case, tmp_path), seed=seed)
        rows = [
            {x.numpy().tobytes() for x in part.x}
            for part in (data.train, data.validation, data.test)
        ]
        assert not rows[0] & rows[1]
        assert not rows[0] & rows[2]
        assert not rows[1] & rows[2]


def test_fills_come_from_the_training_rows(tmp_path: Path) -> None:
    frame = with_gaps()
    data = load(frame)
    inputs = data.preprocessing["inputs"]
    place = data.feature_names.index("bmi")
    marks = data.train.x[:, data.feature_names.index("bmi missing")]
    raw = data.train.x[:, place].double() * inputs["std"][place] + inputs["mean"][place]
    present = raw[marks < 0]
    assert inputs["fill"][place] == pytest.approx(float(np.median(present)), abs=1e-4)
    assert torch.allclose(raw[marks > 0], torch.tensor(inputs["fill"][place]).double(), atol=1e-4)


def test_a_seed_changes_no_column(tmp_path: Path) -> None:
    case = CASES["categories_with_gaps"]()
    names = {load(write(case, tmp_path), seed=seed).feature_names for seed in range(5)}
    assert len(names) == 1


def test_options_of_tables_are_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match=re.escape("target is for tables (csv:FILE")):
        load("digits", target="y")


def test_what_was_taken() -> None:
    assert load(diabetes()).taken == (
        "target progression (regression, 25 … 346), 4 inputs, 319/35/88 rows for "
        "training/validation/test"
    )
    assert load("digits").taken.startswith("target (classification, 10 classes: 0, 1, 2, …, 9)")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="--data parquet:"):
        load(f"csv:{file}")
    monkeypatch.setattr(pd, "read_parquet", lambda path: diabetes())
    assert load(f"parquet:{file}").target == "progression"

    def missing(path: Path) -> None:
        raise ImportError("pyarrow")

    monkeypatch.setattr(pd, "read_parquet", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        load(f"parquet:{file}")


def test_new_rows_are_brought_into_the_same_columns(tmp_path: Path) -> None:
    frame = diabetes()
    frame["sex"] = frame["sex"].map({1: "f", 2: "m"})
    frame.loc[::9, "bmi"] = np.nan
    data = load(frame, validation=0.0)
    x, _ = tables.new_rows(tables.from_frame(frame), data.preprocessing)
    again = {row.numpy().tobytes() for row in x}
    assert {row.numpy().tobytes() for row in torch.cat([data.train.x, data.test.x])} <= again
    # Columns are found by name, and a file says the same as a frame.
    file = tmp_path / "new.csv"
    file.write_text(text(frame[["bp", "bmi", "sex", "age"]]))
    assert torch.equal(tables.new_rows(tables.read_csv(file), data.preprocessing)[0], x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="bp"), "expected a column 'bp', as in training; there are age"),
        (lambda f: f.assign(sex="x"), "line 2, column 'sex': 'x' did not occur in training"),
        (lambda f: f.assign(bp=np.nan), "line 2, column 'bp': a value is missing, and there was"),
        (lambda f: f.assign(age="old"), "line 2, column 'age': expected a number, as in training"),
    ],
    ids=["column", "level", "gap", "word"],
)
def test_new_rows_that_are_refused(
    change: Callable[[pd.DataFrame], pd.DataFrame], message: str, tmp_path: Path
) -> None:
    frame = diabetes()
    frame["sex"] = frame["sex"].map({1: "f", 2: "m"})
    data = load(frame)
    file = tmp_path / "new.csv"
    file.write_text(text(change(frame)))
    with pytest.raises(ValueError, match=re.escape(message)):
        tables.new_rows(tables.read_csv(file), data.preprocessing)
