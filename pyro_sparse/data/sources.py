"""The data sets by name: each function reads one kind into a ``Source``; ``load`` dispatches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.data import tables
from pyro_sparse.data.checks import check
from pyro_sparse.data.dataset import Dataset, Source, hold_out_test, prepare
from pyro_sparse.names import nearest

NAMES = (
    *("digits", "diabetes", "mnist", "fashion-mnist", "cifar10"),
    *("uci:NAME", "csv:FILE", "parquet:FILE", "folder:DIR"),
)
"""What ``load`` takes."""
ROOT_VARIABLE = "PYRO_SPARSE_DATA"
"""Environment variable with the default data root."""

_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def load(
    name: str | Any,
    root: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    validation: float = 0.1,
    split: int = 0,
    seed: int = 0,
    target: str | None = None,
    task: str | None = None,
    drop: Sequence[str] = (),
    missing: str = "impute",
) -> Dataset:
    """A data set by name, or a frame of pandas or polars, split and standardised.

    ========================  ======================================================================
    ``digits``                1797 images (1, 8, 8), 10 classes; embedded in scikit-learn
    ``diabetes``              442 rows, 10 columns, regression; embedded in scikit-learn
    ``mnist``                 70 000 images (1, 28, 28), 10 classes: ROOT/MNIST/raw
    ``fashion-mnist``         likewise: ROOT/FashionMNIST/raw
    ``cifar10``               60 000 images (3, 32, 32), 10 classes: ROOT/cifar-10-batches-py
    ``folder:DIR``            images of one size, DIR/{train,test}/CLASS/*.jpg or *.png; DIR is
                              looked for in the working directory, then in ROOT
    ``uci:NAME``              regression: ROOT/uci/NAME with data.txt, index_features.txt,
                              index_target.txt, index_train_I.txt and index_test_I.txt, I = split
    ``csv:FILE``              a table as text, plain or compressed; delimiter, encoding, header and
                              comments are guessed
    ``parquet:FILE``          a table, by pyarrow
    ========================  ======================================================================

    Tables may have numbers, text (an input for each value), dates (days), empty cells (the median
    of training rows, and an input that marks them) and rows that repeat others, which stay in one
    split. Constant columns are left out. The target is the column ``target``; else the first one if
    it, and not the last, is called ``y``, ``target``, ``label``, ``class``, ``outcome``,
    ``response`` or ``output``; else the last one. Text and two values make a classification, and
    whole numbers of 3 to 20 values where the header has a word such as ``class``, ``label``,
    ``species`` or ``type``, or where it says nothing (``y``, ``target``), they are 0..k-1 or 1..k
    and none is rare; all else is a regression. What was guessed stands in `Dataset.taken` and
    `Dataset.notes`.

    The test rows are the official ones of mnist, fashion-mnist, cifar10, uci and folders; of the
    others a fixed fifth (stratified by class), whatever the seed. Validation rows come from the
    training rows.

    Args:
        name: one of the above.
        root: the folder ROOT; default is the environment variable PYRO_SPARSE_DATA.
        download: fetch missing files of mnist, fashion-mnist and cifar10 into ROOT.
        validation: share of the training rows to carve off, in [0, 1); stratified by class.
        split: which of the official splits of ``uci:NAME``; 0 for the others.
        seed: chooses the validation rows.
        target: name of a table's column to predict; without a header its number, from "1".
        task: of a table: ``"classification"`` or ``"regression"``.
        drop: names of a table's columns to leave out.
        missing: ``"impute"`` or ``"refuse"``: what to do about a table's missing values.

    Raises:
        ValueError: an unknown name, a share or split out of range, or a file with bad content.
        TypeError: neither a name nor a frame.
        FileNotFoundError: no data root, or files missing from it.
        ModuleNotFoundError: a Parquet file without pyarrow.
        ConnectionError: a download failed.
    """
    if not 0 <= validation < 1:
        raise ValueError(
            f"expected a validation share of at least 0 and below 1, got {validation}; "
            "0.1 carves off a tenth of the training rows."
        )
    if not isinstance(seed, int):
        raise ValueError(f"expected seed to be a whole number, got {seed!r}")
    of_tables: dict[str, Any] = {"target": target, "task": task, "drop": drop, "missing": missing}
    if not isinstance(name, str):
        return prepare(
            "frame", tables.source(tables.from_frame(name), **of_tables), validation, seed
        )
    kind, _, argument = name.partition(":")
    if kind in ("csv", "parquet") and argument:
        if split != 0:
            raise ValueError(f"{name} has a single split: expected split=0, got {split}.")
        read = {"csv": tables.read_csv, "parquet": tables.read_parquet}[kind]
        raw = read(Path(argument).expanduser())
        return prepare(name, tables.source(raw, **of_tables), validation, seed)
    given = [key for key, value in of_tables.items() if value not in (None, (), [], "impute")]
    if given:
        raise ValueError(
            f"{given[0]} is for tables (csv:FILE, parquet:FILE or a frame), which {name} is not."
        )
    if split != 0 and kind != "uci":
        raise ValueError(f"{name} has a single split: expected split=0, got {split}.")
    if name == "digits":
        source = _digits()
    elif name == "diabetes":
        source = _diabetes()
    elif name in _TORCHVISION:
        source = _torchvision(name, _root(name, root), download)
    elif name == "cifar10":
        source = _cifar10(_root(name, root), download)
    elif kind == "folder" and argument:
        source = _folder(Path(argument).expanduser(), root or os.environ.get(ROOT_VARIABLE))
    elif kind == "uci" and argument:
        source = _uci(argument, _root(name, root), split)
    else:
        raise ValueError(nearest("data set", name, NAMES))
    return prepare(name, source, validation, seed)


def _root(name: str, root: str | os.PathLike[str] | None) -> Path:
    root = root or os.environ.get(ROOT_VARIABLE)
    if not root:
        raise FileNotFoundError(
            f"{name} is read from a data root, and none is given; name the folder with "
            f"--data-root DIR (root=... in Python) or the environment variable {ROOT_VARIABLE}."
            + (
                f" With --download (download=True) {name} is fetched into it."
                if name in (*_TORCHVISION, "cifar10")
                else ""
            )
        )
    return Path(root).expanduser()


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.as_tensor(bunch.images).to(torch.uint8).unsqueeze(1)
    y = torch.as_tensor(bunch.target).long()
    train, test = hold_out_test(x, y)
    return Source(x, y, train, test, labels=list(range(10)), divide_by=16.0)


def _diabetes() -> Source:
    from sklearn.datasets import load_diabetes

    # scaled=False: scikit-learn's own scaling uses all rows, those for testing included.
    bunch = load_diabetes(scaled=False)
    x, y = torch.as_tensor(bunch.data), torch.as_tensor(bunch.target)
    train, test = hold_out_test(x, None)
    return Source(x, y, train, test, feature_names=tuple(bunch.feature_names))


def _torchvision(name: str, root: Path, download: bool) -> Source:
    raw = root / _TORCHVISION[name] / "raw"
    needed = [
        f"{part}-{content}-ubyte"
        for part in ("train", "t10k")
        for content in ("images-idx3", "labels-idx1")
    ]
    missing = [file for file in needed if not (raw / file).is_file()]
    if missing and not download:
        raise FileNotFoundError(
            f"{name}: looked in {raw}, which lacks {', '.join(missing)}. If you have the files "
            "(torchvision's layout), name the folder above "
            f"{_TORCHVISION[name]} with --data-root DIR (root=... in Python) or the environment "
            f"variable {ROOT_VARIABLE}; otherwise --download (download=True) fetches them."
        )

    from torchvision import datasets

    kind = getattr(datasets, _TORCHVISION[name])
    if missing:
        try:
            kind(root, download=True)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(
                f"{name}: could not download {', '.join(missing)} to {raw} ({error}). "
                "Try again later, or copy the unpacked files there."
            ) from error
    try:
        parts = [kind(root, train=train) for train in (True, False)]
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name}: a file in {raw} is damaged: expected IDX files of images and labels "
            f"({error}). Delete that folder and fetch the files again, for example with --download."
        ) from error
    for part, file in zip(parts, needed[::2], strict=True):
        if len(part.data) != len(part.targets):
            raise ValueError(
                f"{name}: {raw / file} has {len(part.data)} images, but there are "
                f"{len(part.targets)} labels beside it; fetch both files again."
            )
    x = torch.cat([part.data for part in parts]).unsqueeze(1)
    y = torch.cat([part.targets for part in parts]).long()
    train, test = torch.arange(len(x)).split([len(part.data) for part in parts])
    return Source(x, y, train, test, labels=list(range(10)), divide_by=255.0)


def _cifar10(root: Path, download: bool) -> Source:
    folder = root / "cifar-10-batches-py"
    if not folder.is_dir() and not download:
        raise FileNotFoundError(
            f"cifar10: looked for {folder}, which is no folder. If you have the files "
            "(torchvision's layout), name the folder above it with --data-root DIR (root=... in "
            f"Python) or the environment variable {ROOT_VARIABLE}; otherwise --download "
            "(download=True) fetches them. Images as files are read with --data folder:DIR."
        )

    from torchvision import datasets

    try:
        parts = [datasets.CIFAR10(root, train=train, download=download) for train in (True, False)]
    except OSError as error:
        raise ConnectionError(f"cifar10: could not download to {folder} ({error}).") from error
    except RuntimeError as error:
        raise ValueError(
            f"cifar10: a file in {folder} is missing or damaged ({error}). Delete that folder and "
            "fetch the files again with --download."
        ) from error
    x = torch.cat([torch.as_tensor(part.data) for part in parts]).permute(0, 3, 1, 2).contiguous()
    y = torch.cat([torch.as_tensor(part.targets) for part in parts]).long()
    train, test = torch.arange(len(x)).split([len(part.data) for part in parts])
    return Source(x, y, train, test, labels=list(parts[0].classes), divide_by=255.0)


def _folder(path: Path, root: str | os.PathLike[str] | None) -> Source:
    """Images in one folder a class, as torchvision's ``ImageFolder`` reads them."""
    if not path.is_dir() and root is not None and (Path(root).expanduser() / path).is_dir():
        path = Path(root).expanduser() / path
    missing = [part for part in ("train", "test") if not (path / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"folder:{path}: expected folders train and test with one folder a class in each, "
            f"found no {' and no '.join(missing)} in {path.absolute()}."
        )

    import numpy as np
    from torchvision.datasets import ImageFolder

    try:
        parts = [ImageFolder(str(path / part)) for part in ("train", "test")]
    except FileNotFoundError as error:
        raise ValueError(f"folder:{path}: {error}") from error
    if parts[0].classes != parts[1].classes:
        differ = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise ValueError(
            f"folder:{path}: expected the same classes in train and test, but {differ[0]!r} is in "
            "one of them only."
        )
    files = [file for part in parts for file, _ in part.samples]
    # Decoding leaves Python's lock to others: a thread a core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(lambda file: torch.from_numpy(np.array(parts[0].loader(file))), files)
        images = [image.permute(2, 0, 1) for image in read]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"folder:{path}: expected images of one size, as the first one's "
                f"{tuple(images[0].shape)} (channels, height, width), but {file} has "
                f"{tuple(image.shape)}; resize them."
            )
    y = torch.tensor([label for part in parts for _, label in part.samples])
    train, test = torch.arange(len(y)).split([len(part.samples) for part in parts])
    return Source(torch.stack(images), y, train, test, labels=parts[0].classes, divide_by=255.0)


def _uci(name: str, root: Path, split: int) -> Source:
    folder = root / "uci" / name
    if not (folder / "data.txt").is_file():
        known = tuple(sorted(path.parent.name for path in root.glob("uci/*/data.txt")))
        raise FileNotFoundError(
            f"{nearest('UCI data set', name, known)} Looked in {folder}, which has no data.txt; "
            "name the folder above uci with "
            f"--data-root DIR (root=... in Python) or the environment variable {ROOT_VARIABLE}."
        )
    files = {part: folder / f"index_{part}_{split}.txt" for part in ("train", "test")}
    if not all(file.is_file() for file in files.values()):
        known_splits = sorted(
            path.stem.removeprefix("index_train_") for path in folder.glob("index_train_*.txt")
        )
        raise ValueError(
            f"uci:{name}: expected a split that {folder} has files for (index_train_I.txt and "
            f"index_test_I.txt), which are {', '.join(known_splits) or 'none'}; got {split}."
        )
    data = _numbers(folder / "data.txt")
    columns = _indices(folder / "index_features.txt", data.shape[1], "column")
    target = _indices(folder / "index_target.txt", data.shape[1], "column")
    if len(target) != 1 or target[0] in columns:
        raise ValueError(
            f"{folder / 'index_target.txt'}: expected one column that index_features.txt does not "
            f"name, got {target.tolist()}."
        )
    rows = {part: _indices(file, len(data), "row") for part, file in files.items()}
    shared = torch.isin(rows["train"], rows["test"])
    if shared.any():
        raise ValueError(
            f"{files['train']}: {int(shared.sum())} of its rows are test rows too (the first is "
            f"{int(rows['train'][shared][0])}); expected disjoint sets."
        )
    x, y = data[:, columns], data[:, target[0]]
    check(x, y, classes=None, where=str(folder / "data.txt"))
    return Source(x, y, rows["train"], rows["test"])


def _numbers(path: Path) -> Tensor:
    """Lines of numbers separated by blanks, as float64 of shape (lines, columns)."""
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: empty; expected lines of numbers.")
    for number, line in enumerate(lines, 1):
        if len(line) != len(lines[0]):
            raise ValueError(
                f"{path}: row {number} has {len(line)} columns, expected {len(lines[0])} as in the "
                "first row."
            )
    try:
        return torch.tensor([[float(cell) for cell in line] for line in lines], dtype=torch.float64)
    except ValueError as error:
        raise ValueError(f"{path}: expected numbers separated by blanks; {error}.") from None


def _indices(path: Path, size: int, what: str) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"looked for {path}, which lists {what} numbers: no such file.")
    values = _numbers(path).flatten()
    indices = values.long()
    bad = (indices != values) | (indices < 0) | (indices >= size)
    if bad.any():
        raise ValueError(
            f"{path}: expected {what} numbers 0..{size - 1}, got {values[bad][0].item():g}."
        )
    if len(indices.unique()) != len(indices):
        raise ValueError(f"{path}: expected each {what} once, but some are named again.")
    return indices
