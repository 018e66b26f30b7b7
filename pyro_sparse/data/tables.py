"""Tables as people have them: files and frames become columns of numbers, and every guess is said.

`read_csv` and `read_parquet` give a `Raw` table, `from_frame` one of a frame; `source` makes the
``Source`` of it. Which columns there are is decided by the rows that are not for testing, whatever
the seed; medians and scales come later, in `prepare`, from those that are left for training.
`encode` brings other rows into the same columns.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_sparse.data.dataset import Source, hold_out_test, standardisation
from pyro_sparse.names import nearest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

TASKS = ("classification", "regression")
MISSING = ("impute", "refuse")
"""What may be done about missing values."""
TARGET_WORDS = frozenset(
    ("y", "target", "label", "labels", "class", "outcome", "response", "output")
)
"""Headers by which a first column is taken for the target."""
CLASS_WORDS = frozenset(
    (
        *("label", "labels", "class", "classes", "species", "kind", "type", "category", "digit"),
        *("group", "cluster", "variety", "cultivar", "breed", "genre", "status", "diagnosis"),
        *("segment", "sex", "gender"),
    )
)
"""Words in a header by which whole numbers are names of classes and not counts."""
FEW_VALUES = 20
"""A target of more whole numbers than this is a regression target."""
MANY_CLASSES = 100
"""Likewise where its header has one of `CLASS_WORDS`."""
FEWEST_ROWS = 5
"""A fifth of them is a row for testing."""
FEW_LEVELS = 10
"""A column of text may have so many values, however few rows there are."""

DELIMITERS = {"\t": "tab", ";": "semicolon", "|": "bar", ",": "comma"}
EMPTY = frozenset(("", "na", "n/a", "n.a.", "#n/a", "nan", "-nan", "null", "<na>", "?"))
"""Cells without a value, in lower case."""
NO_NUMBER = EMPTY | {"-", "–", "--", ".", "missing", "unknown", "none", "nil"}
"""Likewise among numbers."""
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(\.\d+)?")
DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d.*)?")


@dataclass(frozen=True, eq=False)
class Raw:
    """A table of which nothing but its cells is known.

    Attributes:
        frame: a column a header, of text or of what the frame had.
        where: a file's name, for messages.
        header: whether the names stood there; otherwise they are the columns' numbers.
        lines: line of the file of each row; None of frames.
        notes: what was guessed so far.
    """

    frame: pd.DataFrame
    where: str
    header: bool = True
    lines: Sequence[int] | None = None
    notes: list[str] = field(default_factory=list)

    def place(self, row: int, name: str) -> str:
        """Where a cell is."""
        line = f"row {row}" if self.lines is None else f"line {self.lines[row]}"
        return f"{self.where}, {line}, column {repr(name) if self.header else name}"


# -- reading ---------------------------------------------------------------------------------------


def read_csv(path: Path, fewest: int = 2) -> Raw:
    """A file of delimited text; delimiter, encoding, compression and comments are guessed.

    Args:
        path: of the file.
        fewest: columns; features and a target are two.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no table; the message has the line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"csv:{path}: no such file (looked for {path.absolute()}); a relative path starts at "
            "the working directory, not at the data root."
        )
    text, notes = _text(path)
    rows, comments = _without_comments(text)
    delimiter = _delimiter(rows)
    lines = _split(rows, delimiter)
    if delimiter != ",":
        notes.append(f"columns separated by {DELIMITERS.get(delimiter, 'blanks')}")
    if not lines:
        raise ValueError(f"{path}: no rows of numbers; expected at least one below the header.")
    commented = _split(comments[-1:], delimiter) if comments else []
    if commented and len(commented[0][1]) == len(lines[0][1]) and not _is_header(lines):
        # numpy.savetxt writes its header as a comment.
        number, cells = commented[0]
        cells = [cells[0].lstrip("#% "), *cells[1:]]
        if not any(map(_is_number, cells)):
            lines.insert(0, (number, cells))
            notes.append(f"names of columns from the comment in line {number}")
            comments = comments[:-1]
    if comments:
        plural = "s" if len(comments) > 1 else ""
        notes.append(f"{len(comments)} line{plural} of comments left out")
    header = _is_header(lines)
    body = lines[1:] if header else lines
    if not body:
        raise ValueError(f"{path}: no rows of numbers; expected at least one below the header.")
    names = [cell.strip() for cell in lines[0][1]] if header else []
    if header and any(map(_is_number, names)):
        notes.append(f"the first line is a header, although numbers stand in it: {names[0]}, …")
    if header and len(body[0][1]) == len(names) + 1:
        # R writes names of rows without a header; others write a delimiter after the last cell.
        trailing = all(not cells[-1] for _, cells in body)
        names = [*names, ""] if trailing else ["", *names]
    width = len(names) if header else len(body[0][1])
    for number, cells in body:
        if len(cells) != width:
            raise ValueError(
                f"{path}, line {number}: {len(cells)} columns, expected {width} as in the "
                f"{'header' if header else 'first line'}."
            )
    if width < fewest:
        raise ValueError(
            f"{path}: one column; expected features and a target, separated by commas (or "
            "semicolons, tabs, bars, blanks)."
        )
    import pandas as pd

    frame = pd.DataFrame([cells for _, cells in body], dtype=object)
    names = names or [str(column) for column in range(1, width + 1)]
    frame, notes = _named(frame, names, notes)
    return Raw(frame, str(path), header, [number for number, _ in body], notes)


def read_parquet(path: Path) -> Raw:
    """A Parquet file, by pandas.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: it is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"parquet:{path}: no such file (looked for {path.absolute()}).")
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"parquet:{path}: Parquet files are read by pyarrow, which is not installed; "
            "pip install pyarrow, or save the table as CSV."
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: no Parquet file that pandas can read ({error}).") from error
    return from_frame(frame, str(path))


def from_frame(frame: Any, where: str = "frame", fewest: int = 2) -> Raw:
    """A frame of pandas, or one that has ``to_dict(as_series=False)``, as polars' do.

    Args:
        frame: of pandas or polars.
        where: its name, for messages.
        fewest: columns; features and a target are two.

    Raises:
        TypeError: neither.
        ValueError: fewer than two columns, or no rows.
    """
    import pandas as pd

    if type(frame).__module__.partition(".")[0] == "polars":
        frame = pd.DataFrame(frame.to_dict(as_series=False))
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"expected a name, or a frame of pandas or polars, got {type(frame).__name__}; "
            "pandas.DataFrame(...) makes one of arrays"
        )
    if len(frame.columns) < fewest or not len(frame):
        raise ValueError(
            f"{where}: expected rows with features and a target, got shape {frame.shape}"
        )
    names = [
        "_".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in frame.columns
    ]
    frame, notes = _named(frame.reset_index(drop=True), names, [])
    return Raw(frame, where, notes=notes)


def _named(
    frame: pd.DataFrame, names: Sequence[str], notes: list[str]
) -> tuple[pd.DataFrame, list[str]]:
    """The frame under these names, each made unique; an unnamed column of row numbers is left."""
    unnamed = [i for i, name in enumerate(names) if not name or re.fullmatch(r"Unnamed: \d+", name)]
    index = [i for i in unnamed if _counts_rows(frame.iloc[:, i])]
    empty = [i for i in unnamed if frame.iloc[:, i].isin(["", None]).all()]
    gone = {*index, *empty}
    if gone and len(gone) < len(names):
        left = "numbers of rows" if index else "nothing in it"
        notes.append(f"the column without a name, with {left}, was left out")
    else:
        gone = set()
    unique: list[str] = []
    for place, name in enumerate(names, 1):
        name, count = name or f"column {place}", 0
        found = name
        while found in unique:
            count += 1
            found = f"{name}.{count}"
        if count:
            notes.append(f"warning: two columns are called {name!r}; column {place} is {found!r}")
        unique.append(found)
    frame = frame.set_axis(unique, axis=1)
    return frame.iloc[:, [i for i in range(len(unique)) if i not in gone]], notes


def _counts_rows(values: pd.Series) -> bool:
    """Whether they are consecutive whole numbers."""
    import pandas as pd

    numbers = pd.to_numeric(values, errors="coerce")
    return bool(numbers.notna().all() and (numbers.diff().dropna() == 1).all() and len(numbers) > 1)


def _text(path: Path) -> tuple[str, list[str]]:
    """What stands in a file, and how it was written where that is not plain UTF-8."""
    content, notes = path.read_bytes(), []
    packed = {
        b"\x1f\x8b": ("gzip", gzip.decompress),
        b"BZh": ("bzip2", bz2.decompress),
        b"\xfd7zXZ": ("xz", lzma.decompress),
        b"PK\x03\x04": ("zip", lambda content: _only_member(path, content)),
    }
    for magic, (kind, unpack) in packed.items():
        if content.startswith(magic):
            try:
                content = unpack(content)
            except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile) as error:
                raise ValueError(f"{path}: the {kind} file is damaged ({error}).") from error
            notes.append(f"compressed by {kind}")
            break
    if content.startswith(b"PAR1"):
        raise ValueError(f"{path}: a Parquet file; name it with --data parquet:{path}.")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = content.decode("utf-16", errors="replace")
        notes.append("encoding UTF-16")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252", errors="replace")
            notes.append("encoding Windows-1252, as it is no UTF-8")
    if "\0" in text:
        raise ValueError(f"{path}: expected a table of text, but there are zero bytes in it.")
    return text, notes


def _only_member(path: Path, content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [
            one for one in archive.namelist() if not one.endswith("/") and "__MACOSX" not in one
        ]
        if "[Content_Types].xml" in names:
            raise ValueError(f"{path}: an Excel workbook; save the sheet as CSV and name that.")
        if len(names) != 1:
            raise ValueError(
                f"{path}: expected a zip file with one table in it, got {len(names)} files "
                f"({', '.join(names[:3])}); unpack the one that is meant."
            )
        return archive.read(names[0])


Line = tuple[int, str]


def _without_comments(text: str) -> tuple[list[Line], list[Line]]:
    """Lines with their numbers from 1, and those that are comments: begun by # or %, unquoted."""
    lines = list(enumerate(io.StringIO(text, newline=None).read().split("\n"), 1))
    marked = {number for number, line in lines if line.lstrip().startswith(("#", "%"))}
    filled = sum(bool(line.strip()) for _, line in lines)
    if not marked or 2 * len(marked) > filled:
        return lines, []
    inside, rows, comments = False, [], []
    for number, line in lines:
        if number in marked and not inside:
            comments.append((number, line))
            rows.append((number, ""))  # numbers of lines are counted on
            continue
        inside ^= line.count('"') % 2 == 1
        rows.append((number, line))
    return rows, comments


def _delimiter(rows: Sequence[Line], most: int = 200) -> str:
    """What separates columns: the first of `DELIMITERS` that cuts nine lines in ten into as many.

    Where none does, the one that cuts most of them so; a blank where no other one occurs.
    """
    sample = [(number, line) for number, line in rows if line.strip()][:most]
    shares = {}
    for delimiter in DELIMITERS:
        widths = Counter(len(cells) for _, cells in _split(sample, delimiter))
        width, count = widths.most_common(1)[0] if widths else (1, 0)
        # A mean line is as wide as most: a few commas in a sentence are no columns.
        share = count / widths.total() if width > 1 else 0.0
        if widths and width == 1 and max(widths) > 1:
            share = 0.0
        if share >= 0.9:
            return delimiter
        shares[delimiter] = share
    best = max(shares, key=lambda one: shares[one])
    if shares[best] > 0:
        return best
    return " " if any(len(line.split()) > 1 for _, line in sample) else ","


def _split(rows: Sequence[Line], delimiter: str) -> list[tuple[int, list[str]]]:
    """Cells of every line that is not blank, with its number; a quoted cell may have several."""
    numbers = [number for number, _ in rows]
    if delimiter == " ":
        return [(number, line.split()) for number, line in rows if line.strip()]
    reader = csv.reader(
        (line + "\n" for _, line in rows), delimiter=delimiter, skipinitialspace=True
    )
    found, start = [], 0
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found.append((numbers[start], [cell.strip() for cell in cells]))
            start = reader.line_num
    except csv.Error as error:
        raise ValueError(
            f"line {numbers[min(start, len(numbers) - 1)]}: no cell can be read there ({error}); "
            "is a quotation mark left open?"
        ) from error
    return found


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_header(lines: Sequence[tuple[int, list[str]]]) -> bool:
    """Whether the first line has names.

    So where none of its cells is a number, unless all columns are text and the first line's occur
    again below; where a name stands above a column of numbers; and where its numbers are years, or
    0, 1, 2, ... as pandas counts columns, above others.
    """
    first, body = lines[0][1], [cells for _, cells in lines[1:201]]
    if not body:
        return not any(map(_is_number, first))
    columns = list(zip(*(cells for cells in body if len(cells) == len(first)), strict=True))
    numeric = [_mostly_numbers(column) for column in columns] or [False] * len(first)
    words = [not _is_number(cell) and cell.lower() not in NO_NUMBER for cell in first]
    if any(word and number for word, number in zip(words, numeric, strict=True)):
        return not any(DECIMAL_COMMA.fullmatch(cell) for cell in first)
    if all(map(_is_number, first)) and columns:
        counted = first == [str(i) for i in range(len(first))] and len(first) > 2
        years = all(re.fullmatch(r"(?:19|20)\d\d", cell) for cell in first)
        same = sum(cell in column for cell, column in zip(first, columns, strict=True))
        below = [cell for column in columns for cell in column]
        year_like = sum(bool(re.fullmatch(r"(?:19|20)\d\d", cell)) for cell in below)
        return (counted and same <= len(first) // 2) or (years and 2 * year_like < len(below))
    if any(map(_is_number, first)):
        return False
    again = any(cell in column for cell, column in zip(first, columns, strict=bool(columns)))
    return not again and (not columns or len(set(first)) == len(first))


def _mostly_numbers(column: Sequence[str]) -> bool:
    filled = [cell for cell in column if cell.lower() not in NO_NUMBER]
    numbers = sum(_is_number(cell) or bool(DECIMAL_COMMA.fullmatch(cell)) for cell in filled)
    return 2 * numbers > len(filled)


# -- columns ---------------------------------------------------------------------------------------


def _values(raw: Raw, name: str) -> tuple[str, pd.Series]:
    """One column's kind, number, category or date, and its values: float64, or text with None.

    Raises:
        ValueError: a number that is infinite, or a word among numbers.
    """
    import pandas as pd

    column = raw.frame[name]
    if isinstance(column.dtype, pd.CategoricalDtype) or pd.api.types.is_bool_dtype(column):
        return "category", column.astype(object).map(str, na_action="ignore").where(column.notna())
    if pd.api.types.is_datetime64_any_dtype(column):
        return "date", _days(column)
    if pd.api.types.is_numeric_dtype(column):
        numbers = column.astype("float64")
        _check_finite(raw, name, numbers, column)
        return "number", numbers
    if not all(isinstance(cell, str) or pd.api.types.is_scalar(cell) for cell in column):
        raise ValueError(
            f"{raw.where}, column {name!r}: expected numbers or text in the cells, got "
            f"{type(column.iloc[0]).__name__}; drop it, or make columns of it."
        )
    cells = column.map(lambda cell: str(cell).strip(), na_action="ignore").astype(object)
    filled = cells.notna() & ~cells.str.lower().isin(NO_NUMBER)
    numbers = pd.to_numeric(cells.where(filled), errors="coerce").astype("float64")
    words = cells[filled & numbers.isna()]
    if len(words):
        commas = _with_commas(raw, name, cells[filled], words)
        if commas is not None:
            numbers, words = commas.reindex(cells.index), words[:0]
    if filled.any() and not len(words):
        _check_finite(raw, name, numbers, cells)
        return "number", numbers
    if 2 * len(words) < int(filled.sum()) and int(filled.sum()) - len(words) > 1:
        row = int(words.index[0])
        raise ValueError(
            f"{raw.place(row, name)}: expected a number, got {words.iloc[0]!r}, as "
            f"{int(filled.sum()) - len(words)} of {int(filled.sum())} cells of the column are "
            "numbers; correct it, or leave it empty where it is missing."
        )
    cells = cells.where(cells.notna() & ~cells.str.lower().isin(EMPTY), None)
    present = cells.dropna()
    if len(present) and present.map(lambda cell: bool(DATE.fullmatch(cell))).all():
        days = pd.to_datetime(cells, format="ISO8601", errors="coerce", utc=True)
        if int(days.notna().sum()) == len(present):
            return "date", _days(days)
    return "category", cells


def _days(dates: pd.Series) -> pd.Series:
    """Days since 1970, float64 with NaN."""
    import pandas as pd

    if dates.dt.tz is not None:
        dates = dates.dt.tz_convert("UTC").dt.tz_localize(None)
    return (dates - pd.Timestamp(0)) / pd.Timedelta(days=1)


def _with_commas(raw: Raw, name: str, filled: pd.Series, words: pd.Series) -> pd.Series | None:
    """Numbers that were written with commas; None where words are no such numbers."""
    import pandas as pd

    thousands = words.map(lambda cell: THOUSANDS.fullmatch(cell))
    decimal = words.map(lambda cell: bool(DECIMAL_COMMA.fullmatch(cell)))
    points = filled.str.contains(".", regex=False).any()
    grouped = bool(thousands.map(bool).all())
    if grouped and decimal.all() and not points and words.str.count(",").max() == 1:
        # 1,234 alone is one and a bit, or more than a thousand.
        elsewhere = any(
            DECIMAL_COMMA.fullmatch(cell) and not THOUSANDS.fullmatch(cell)
            for other in raw.frame.columns
            for cell in raw.frame[other]
            if isinstance(cell, str)
        )
        if not elsewhere:
            row = int(words.index[0])
            raise ValueError(
                f"{raw.place(row, name)}: {words.iloc[0]!r} may mean "
                f"{words.iloc[0].replace(',', '.')} or {words.iloc[0].replace(',', '')}; write "
                "numbers with a point, and thousands without a comma."
            )
        grouped = False
    if grouped:
        raw.notes.append(f"column {name!r}: commas between thousands")
        return pd.to_numeric(filled.str.replace(",", "", regex=False)).astype("float64")
    if decimal.all() and not points:
        raw.notes.append(f"column {name!r}: decimal commas")
        return pd.to_numeric(filled.str.replace(",", ".", regex=False)).astype("float64")
    return None


def _check_finite(raw: Raw, name: str, numbers: pd.Series, cells: pd.Series) -> None:
    infinite = numbers.isin([float("inf"), float("-inf")])
    if infinite.any():
        row = int(infinite.to_numpy().argmax())
        raise ValueError(
            f"{raw.place(row, name)}: expected a finite number, got {cells.iloc[row]!r}; write the "
            "number, or leave the cell empty where it is missing."
        )


def _pick_target(raw: Raw, target: str | None) -> str:
    names = list(raw.frame.columns)
    if target is not None:
        if target not in names:
            raise ValueError(f"{raw.where}: {nearest('column', target, names)}")
        return target
    first, last = names[0], names[-1]
    if not raw.header:
        raw.notes.append(f"the target is the last column, {last}; name another one with --target")
        return last
    if first.lower() in TARGET_WORDS and last.lower() not in TARGET_WORDS:
        raw.notes.append(
            f"the target is the first column, {first!r}, by its name; name another with --target"
        )
        return first
    if last.lower() not in TARGET_WORDS:
        raw.notes.append(
            f"the target is {last!r}, as it stands last; name another one with --target"
        )
    return last


def _labels(
    raw: Raw, name: str, kind: str, values: pd.Series, task: str | None
) -> tuple[list[Any] | None, Tensor]:
    """Classes and the number of each row's, or None and the numbers of a regression.

    Text and two values are classes, numbers with a fraction and dates none. Whole numbers of three
    to `FEW_VALUES` values are classes where a word of the header says so (`CLASS_WORDS`), or where
    the header says nothing and they are 0..k-1 or 1..k and each is in at least a fifth of N/k rows;
    else they are counts or grades, whose order matters: a regression.
    """
    import numpy as np

    here = f"{raw.where}, target {name!r}"
    if kind == "category":
        if task == "regression":
            row = int(values.index[0])
            raise ValueError(
                f"{raw.place(row, name)}: expected a number for a regression, got "
                f"{values.iloc[0]!r}; name another --target, or --task classification."
            )
        levels = sorted(values.unique())
        _check_classes(here, values)
        return levels, torch.as_tensor([levels.index(value) for value in values])
    numbers = values.to_numpy()
    distinct, index, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    whole = bool((distinct == distinct.round()).all()) and kind == "number"
    words = set(re.split(r"[^a-z]+", name.lower())) if raw.header else set()
    neutral = not raw.header or name.lower() in TARGET_WORDS
    k = len(distinct)
    why = ""
    if task is None and k == 2:
        classes = True
    elif task is None and whole and 2 < k <= MANY_CLASSES and words & CLASS_WORDS:
        classes = bool(counts.min() > 1)
        why = "classes, by its name"
    elif task is None and whole and 2 < k <= FEW_VALUES:
        run = distinct.tolist() in (list(range(k)), list(range(1, k + 1)))
        classes = neutral and run and bool(counts.min() * 5 * k >= len(numbers))
        why = "classes, none of them rare" if classes else "numbers, whose order matters"
    else:
        classes = task == "classification"
    if why:
        other = TASKS[classes]
        raw.notes.append(
            f"the {k} whole numbers of the target are taken for {why}; if not, --task {other}"
        )
    if not classes:
        if k == 1:
            raw.notes.append(f"warning: the target is {distinct[0]:g} in all rows")
        return None, torch.as_tensor(numbers.copy())
    _check_classes(here, values)
    labels = distinct.astype(int).tolist() if whole else distinct.tolist()
    return labels, torch.as_tensor(index)


def _check_classes(here: str, values: pd.Series) -> None:
    counts = values.value_counts()
    if len(counts) < 2:
        raise ValueError(
            f"{here}: expected at least two classes, got only {counts.index[0]!r}; name another "
            "--target."
        )
    if len(counts) > MANY_CLASSES or 2 * len(counts) > len(values):
        raise ValueError(
            f"{here}: {len(counts)} different values in {len(values)} rows are too many for "
            "classes; name another --target, or --task regression for numbers."
        )


def source(
    raw: Raw,
    *,
    target: str | None = None,
    task: str | None = None,
    drop: Sequence[str] = (),
    missing: str = "impute",
) -> Source:
    """Columns of numbers, test rows and all that was guessed; arguments as of ``load``.

    Raises:
        ValueError: the table, or an argument, is wrong; the message has line and column.
    """
    if task is not None and task not in TASKS:
        raise ValueError(nearest("task", task, TASKS))
    if missing not in MISSING:
        raise ValueError(nearest("way to treat missing values", missing, MISSING))
    unknown = [name for name in drop if name not in raw.frame.columns]
    if unknown:
        raise ValueError(f"{raw.where}: {nearest('column', unknown[0], raw.frame.columns)}")
    if target is not None and target in drop:
        raise ValueError(f"{raw.where}: the target {target!r} cannot be dropped.")
    raw = _rows_left(raw, ~raw.frame.columns.isin(list(drop)))
    target = _pick_target(raw, target)
    kind, values = _values(raw, target)
    present = values.notna().to_numpy()
    if not present.all():
        _refuse_missing(raw, target, present, missing)
        raw.notes.append(f"{int((~present).sum())} rows without a target are left out")
        if not present.any():
            raise ValueError(f"{raw.where}: the target {target!r} has no value in any row.")
        raw = _rows_left(raw, slice(None), present)
        values = values[present].reset_index(drop=True)
    if len(values) < FEWEST_ROWS:
        raise ValueError(
            f"{raw.where}: {len(values)} rows are too few to hold out test rows (a fifth, and each "
            f"class keeps one for training); expected {FEWEST_ROWS} or more."
        )
    labels, y = _labels(raw, target, kind, values, task)
    inputs = [name for name in raw.frame.columns if name != target]
    columns = {name: _values(raw, name) for name in inputs}
    for name, (_, cells) in columns.items():
        _refuse_missing(raw, name, cells.notna().to_numpy(), missing)
    groups = _repeated(raw, columns, values)
    train, test = hold_out_test(y, None if labels is None else y, groups)
    if len(test) == 0:
        raise ValueError(
            f"{raw.where}: no rows can be held out for testing, as each class and each set of "
            f"equal rows keeps one for training; expected more rows, or fewer classes."
        )
    plan = _plan(raw, columns, train)
    x = encode(columns, plan)
    _warn(raw, columns, values if labels is None else None)
    # Numbers only, in a file without names: there is nothing to call them by.
    nameless = not raw.header and len(plan) == len(inputs)
    return Source(
        x,
        y,
        train,
        test,
        labels=labels,
        feature_names=None if nameless else tuple(one["name"] for one in plan),
        variables=None if nameless else tuple(one["variable"] for one in plan),
        columns=plan,
        target=target,
        groups=groups,
        notes=tuple(raw.notes),
    )


def _rows_left(raw: Raw, columns: Any, rows: Any = slice(None)) -> Raw:
    import numpy as np

    lines = None if raw.lines is None else np.asarray(raw.lines)[rows].tolist()
    frame = raw.frame.loc[rows, :].loc[:, columns].reset_index(drop=True)
    if frame.shape[1] < 2:
        raise ValueError(f"{raw.where}: no column is left but {list(frame.columns)}.")
    return Raw(frame, raw.where, raw.header, lines, raw.notes)


def _refuse_missing(raw: Raw, name: str, present: Any, missing: str) -> None:
    if missing == "refuse" and not present.all():
        row = int((~present).argmax())
        raise ValueError(
            f"{raw.place(row, name)}: a value is missing ({int((~present).sum())} are in this "
            "column); fill it, drop the row, or take --missing impute."
        )


def _repeated(
    raw: Raw, columns: Mapping[str, tuple[str, pd.Series]], values: pd.Series
) -> Tensor | None:
    """Number of the first row that is the same as each; None where rows are not kept together."""
    import pandas as pd

    everything = [*(cells for _, cells in columns.values()), values]
    frame = pd.concat(everything, axis=1, keys=range(len(everything)))
    codes = frame.groupby(list(frame.columns), dropna=False, sort=False).ngroup().to_numpy()
    repeats = len(codes) - len(set(codes.tolist()))
    if not repeats:
        return None
    if 2 * repeats > len(codes):
        raw.notes.append(
            f"{repeats} of {len(codes)} rows repeat another one: too many to keep them together"
        )
        return None
    raw.notes.append(f"{repeats} rows repeat another one, and stay in one split with it")
    return torch.as_tensor(codes.copy())


def _plan(
    raw: Raw, columns: Mapping[str, tuple[str, pd.Series]], train: Tensor
) -> list[dict[str, str]]:
    """What each input is made of, in JSON's types, by the rows that are not for testing.

    ``name`` of the input, ``variable`` (the table's column), and ``kind``: number, date (days since
    1970), level (1 where the cell is ``level``; ``other`` is the only other one, where it has no
    input of its own) or missing (1 where the cell is empty).

    Raises:
        ValueError: a column of text with too many values, or none that varies.
    """
    plan: list[dict[str, str]] = []
    constant, wordy, filled = [], [], []
    for name, (kind, cells) in columns.items():
        own = cells.iloc[train.numpy()]
        present, before = own.dropna(), len(plan)
        gap = 0 < len(present) < len(own)
        if kind != "category" and present.nunique() > 1:
            plan.append({"name": name, "variable": name, "kind": kind})
            if cells.isna().any():
                filled.append(f"{name} ({int(cells.isna().sum())})")
        elif kind == "category":
            levels = sorted(present.unique())
            if len(levels) > FEW_LEVELS and 4 * len(levels) > len(present):
                wordy.append(f"{name!r} ({len(levels)} in {len(present)} rows, as {levels[0]!r})")
                continue
            one = {"variable": name, "kind": "level"}
            if len(levels) == 2 and not gap:
                two = {"level": levels[1], "other": levels[0]}
                plan.append({"name": f"{name}={levels[1]}", **one, **two})
            elif len(levels) > 1:
                plan += [{"name": f"{name}={level}", **one, "level": level} for level in levels]
            rare = sorted({*cells.dropna()} - {*levels})
            if rare and len(levels) > 1:
                raw.notes.append(
                    f"warning: column {name!r}: {len(rare)} values, such as {rare[0]!r}, occur in "
                    "test rows only"
                )
        if gap:
            plan.append({"name": f"{name} missing", "variable": name, "kind": "missing"})
        if len(plan) == before:
            constant.append(name)
    if wordy:
        raise ValueError(
            f"{raw.where}: columns of text with too many values to be categories: "
            f"{', '.join(wordy)}; leave them out with --drop NAME, or write them as numbers."
        )
    if filled:
        raw.notes.append(
            f"missing numbers are filled with the training rows' median: {', '.join(filled)}"
        )
    if constant:
        raw.notes.append(f"constant columns are left out: {', '.join(constant)}")
    if not plan:
        raise ValueError(f"{raw.where}: every column but the target is constant.")
    names = [one["name"] for one in plan]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{raw.where}: two inputs would be called {twice!r}; rename a column.")
    return plan


def encode(
    columns: Mapping[str, tuple[str, pd.Series]], plan: Sequence[Mapping[str, str]]
) -> Tensor:
    """The inputs that a plan names, float64 of shape (rows, inputs), with NaN for missing numbers.

    Args:
        columns: kind and values of each variable.
        plan: see `_plan`.
    """
    import numpy as np

    made = []
    for one in plan:
        cells = columns[one["variable"]][1]
        if one["kind"] == "level":
            made.append((cells == one["level"]).to_numpy(dtype="float64"))
        elif one["kind"] == "missing":
            made.append(cells.isna().to_numpy(dtype="float64"))
        else:
            made.append(cells.to_numpy(dtype="float64"))
    return torch.as_tensor(np.stack(made, axis=1))


def learn(raw: Raw) -> dict[str, Any]:
    """What `new_rows` needs to know of a table of inputs alone, by all of its rows.

    Raises:
        ValueError: the table is wrong; the message has row and column.
    """
    columns = {name: _values(raw, name) for name in raw.frame.columns}
    rows = torch.arange(len(raw.frame))
    plan = _plan(raw, columns, rows)
    _, facts = standardisation(encode(columns, plan), rows)
    return {"inputs": facts, "columns": plan}


def new_rows(raw: Raw, preprocessing: Mapping[str, Any]) -> tuple[Tensor, list[str]]:
    """Rows of another table as a network's inputs, float32 of shape (rows, inputs).

    Args:
        raw: the table; columns that the network does not know are left.
        preprocessing: of the `Dataset` that it was trained on.

    Returns:
        The inputs, and what there is to say about them.

    Raises:
        ValueError: a column is not there, is of another kind, or lacks a value although none was
            missing in training; the message has line and column.
    """
    plan, facts = preprocessing["columns"], preprocessing["inputs"]
    columns: dict[str, tuple[str, pd.Series]] = {}
    for name in dict.fromkeys(one["variable"] for one in plan):
        if name not in raw.frame.columns:
            raise ValueError(
                f"{raw.where}: expected a column {name!r}, as in training; there are "
                f"{', '.join(map(str, raw.frame.columns))}."
            )
        kinds = {one["kind"]: one for one in plan if one["variable"] == name}
        columns[name] = kind, cells = _as_kind(raw, name, kinds)
        gone = cells.isna().to_numpy()
        if gone.any() and "missing" not in kinds and "fill" not in facts:
            raise ValueError(
                f"{raw.place(int(gone.argmax()), name)}: a value is missing, and there was none "
                "in training; fill it."
            )
        if kind == "category":
            own = [one for one in plan if one["variable"] == name]
            known = {one[key] for one in own for key in ("level", "other") if key in one}
            new = sorted({*cells.dropna()} - known)
            if new and known:
                row = int(cells.isin(new).to_numpy().argmax())
                raise ValueError(
                    f"{raw.place(row, name)}: {cells.iloc[row]!r} did not occur in training; known "
                    f"are {', '.join(sorted(known))}."
                )
    x = encode(columns, plan)
    if "fill" in facts:
        x = torch.where(x.isnan(), torch.tensor(facts["fill"], dtype=x.dtype), x)
    mean, std = (torch.tensor(facts[key], dtype=x.dtype) for key in ("mean", "std"))
    return ((x - mean) / std).float(), raw.notes


def _as_kind(raw: Raw, name: str, kinds: Mapping[str, Any]) -> tuple[str, pd.Series]:
    """A column as what it was in training."""
    kind, cells = _values(raw, name)
    if "level" in kinds:
        if kind == "category":
            return kind, cells
        # Words that look like numbers, or no value in any row.
        text = raw.frame[name].map(str, na_action="ignore").astype(object)
        return "category", text.where(cells.notna(), None)
    if kind == "category" and cells.isna().all():
        return "number", cells.astype("float64")
    wanted = [one for one in ("number", "date") if one in kinds]
    if wanted and kind != wanted[0]:
        row = int(cells.notna().to_numpy().argmax())
        raise ValueError(
            f"{raw.place(row, name)}: expected a {wanted[0]}, as in training, got "
            f"{raw.frame[name].iloc[row]!r}."
        )
    return kind, cells


def _warn(raw: Raw, columns: Mapping[str, tuple[str, pd.Series]], target: pd.Series | None) -> None:
    """Columns that are twice there, count rows, or are the target itself."""
    import pandas as pd

    seen: dict[bytes, str] = {}
    for name, (kind, cells) in columns.items():
        if cells.nunique() < 2:
            continue
        codes = cells.to_numpy() if kind != "category" else pd.factorize(cells)[0]
        first = seen.setdefault(codes.tobytes(), name)
        if first != name:
            raw.notes.append(f"warning: columns {first!r} and {name!r} say the same")
        if kind == "number" and cells.is_unique and cells.notna().all():
            ordered = cells.sort_values()
            whole = bool((cells == cells.round()).all())
            in_steps = bool((ordered.diff().dropna() == 1).all())
            called = re.search(r"(?:^|[_ ])(?:id|index|key|nr|no|number)$", name.lower())
            if whole and (in_steps or called) and raw.header:
                raw.notes.append(
                    f"warning: column {name!r} looks like an identifier; leave it out with --drop"
                )
        if target is not None and kind == "number" and bool((cells == target).all()):
            raw.notes.append(f"warning: column {name!r} is the target itself")
