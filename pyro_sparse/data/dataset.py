"""What ``load`` returns, and how rows become training, validation and test sets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

TEST_FRACTION = 0.2
"""Share of the rows held out for testing where a data set has no official test rows."""
TEST_SEED = 0
"""Chooses these rows. Not the user's seed: figures of different seeds share one test set."""


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of one use.

    Attributes:
        x: standardised features, float32.
            Shape: (N, features...).
        y: labels, int64, or standardised targets, float32.
            Shape: (N,).
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> Split:
        """The same rows on another device."""
        return Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits and how they were made from the raw data.

    Attributes:
        name: as given to ``load``.
        task: ``"classification"`` or ``"regression"``.
        train, validation, test: see :class:`Split`; ``validation`` is empty if none was asked for.
        classes: number of classes; None for regression.
        feature_names: one an input of a table; None for images and unnamed columns.
        variables: the table's column that each input is made of: several inputs share one where it
            has categories or missing values. None as ``feature_names``.
        target: name of the table's target, where known.
        notes: what was guessed, left out or is suspicious about a table, a sentence each.
        preprocessing: plain numbers and lists, for JSON.
            ``["inputs"]`` has ``divide_by``, ``mean`` and ``std`` (a number for images, a list with
            one a column for tables): ``x = (raw / divide_by - mean) / std``.
            ``["target"]`` has, for regression, ``mean`` and ``std`` in the target's own unit:
            ``y = (raw - mean) / std``, so an RMSE times ``std`` is in that unit;
            for classification ``labels``: the raw label of class 0, 1, ...
            Tables with missing numbers have ``["inputs"]["fill"]``, what stands for one in each
            column, before scaling. Tables that were read here have ``["columns"]``: what each input
            is made of, see :func:`pyro_sparse.data.tables.encode`.
    """

    name: str
    task: Literal["classification", "regression"]
    train: Split
    validation: Split
    test: Split
    classes: int | None
    feature_names: tuple[str, ...] | None
    preprocessing: dict[str, Any]
    variables: tuple[str, ...] | None = None
    target: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row of x."""
        return tuple(self.train.x.shape[1:])

    @property
    def outputs(self) -> int:
        """Outputs that a network for this task has: one a class, or one mean."""
        return 1 if self.classes is None else self.classes

    @property
    def target_scale(self) -> float:
        """Standard deviation of a regression's targets in their own unit; 1 for classes."""
        return float(self.preprocessing.get("target", {}).get("std", 1.0))

    @property
    def labels(self) -> list[int] | list[str] | None:
        """The raw label of each class; None for regression."""
        return self.preprocessing.get("target", {}).get("labels")

    @property
    def taken(self) -> str:
        """What was taken for what, in a line: target, task, inputs, and rows of the splits."""
        name = "target" if self.target in (None, "target") else f"target {self.target}"
        if self.classes is not None:
            shown = [str(label) for label in self.labels or range(self.classes)]
            shown = shown if len(shown) <= 6 else [*shown[:3], "…", shown[-1]]
            what = f"classification, {self.classes} classes: {', '.join(shown)}"
        else:
            facts = self.preprocessing.get("target", {"mean": 0.0, "std": 1.0})
            y = torch.cat([part.y for part in (self.train, self.validation, self.test)]).double()
            ends = (float(end) * facts["std"] + facts["mean"] for end in y.aminmax())
            # Zero, and not the rounding error of standardised float32.
            low, high = (end if abs(end) > 1e-6 * facts["std"] else 0.0 for end in ends)
            what = f"regression, {low:.4g} … {high:.4g}"
        shape = self.input_shape
        inputs = f"{shape[0]} inputs" if len(shape) == 1 else f"images {'×'.join(map(str, shape))}"
        if self.variables is not None and len(set(self.variables)) < len(self.variables):
            inputs += f" of {len(set(self.variables))} columns"
        rows = "/".join(str(len(part)) for part in (self.train, self.validation, self.test))
        return f"{name} ({what}), {inputs}, {rows} rows for training/validation/test"

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )


@dataclass(frozen=True, eq=False)
class Source:
    """Raw data, before validation rows are carved and anything is standardised.

    Attributes:
        x: uint8 images or a float64 table.
            Shape: (N, channels, height, width) or (N, columns).
        y: int64 labels in 0..classes-1 or float64 targets.
            Shape: (N,).
        train, test: row numbers.
            Shape: (N_train,), (N_test,).
        labels: the raw label of each class; None for regression.
        divide_by: the largest value of a pixel; 1 for tables.
        feature_names: one a column, if known.
        variables, target, notes: see `Dataset`.
        columns: what each column is made of, for ``preprocessing``.
        groups: a number for each row; rows of one number stay in one split. None: all differ.
            Shape: (N,).
    """

    x: Tensor
    y: Tensor
    train: Tensor
    test: Tensor
    labels: list[int] | list[str] | None = None
    divide_by: float = 1.0
    feature_names: tuple[str, ...] | None = None
    variables: tuple[str, ...] | None = None
    target: str | None = None
    notes: tuple[str, ...] = ()
    columns: list[dict[str, str]] | None = None
    groups: Tensor | None = None


def hold_out(
    rows: Tensor, strata: Tensor | None, fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Split row numbers at random into those that stay and those that are held out.

    Each stratum gives its share, rounded so that round(fraction * N) rows are held out in all
    (largest remainders first), but keeps at least one row of its own.

    Args:
        rows: the row numbers to split.
            Shape: (N,).
        strata: the stratum (class) of each, int64; None for a single one.
            Shape: (N,).
        fraction: share to hold out, in [0, 1).
        seed: chooses which.

    Returns:
        The rows that stay and the rows held out, each in rising order of their place in ``rows``.
    """
    strata = torch.zeros_like(rows) if strata is None else strata
    counts = strata.bincount()
    share = counts.double() * fraction
    quota = share.long()
    extra = round(len(rows) * fraction) - int(quota.sum())
    quota[(share - quota).argsort(descending=True, stable=True)[:extra]] += 1
    quota = quota.minimum((counts - 1).clamp(min=0))

    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    by_stratum = shuffled[strata[shuffled].argsort(stable=True)].split(counts.tolist())
    held = torch.zeros(len(rows), dtype=torch.bool)
    for members, size in zip(by_stratum, quota.tolist(), strict=True):
        held[members[:size]] = True
    return rows[~held], rows[held]


def hold_out_together(
    rows: Tensor, strata: Tensor | None, groups: Tensor | None, fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """As `hold_out`, but rows of one group stay together: each goes where its first one goes.

    Args:
        rows, strata, fraction, seed: see `hold_out`.
        groups: of each row; None where all differ.
            Shape: (N,).
    """
    if groups is None:
        return hold_out(rows, strata, fraction, seed)
    numbers, group = groups.unique(return_inverse=True)
    place = torch.arange(len(rows))
    first = torch.full((len(numbers),), len(rows)).scatter_reduce(0, group, place, "amin")
    ordered = first.sort().values
    _, held = hold_out(ordered, None if strata is None else strata[ordered], fraction, seed)
    out = torch.isin(first, held)[group]
    return rows[~out], rows[out]


def hold_out_test(
    x: Tensor, strata: Tensor | None, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Training and test rows of data without official ones: always the same."""
    return hold_out_together(torch.arange(len(x)), strata, groups, TEST_FRACTION, TEST_SEED)


def prepare(name: str, source: Source, validation: float, seed: int) -> Dataset:
    """Carve the validation rows, then standardise everything by what is left for training.

    Raises:
        ValueError: a validation share that leaves no validation rows although some are asked for.
    """
    classification = source.labels is not None
    strata = source.y[source.train] if classification else None
    groups = None if source.groups is None else source.groups[source.train]
    train, held = hold_out_together(source.train, strata, groups, validation, seed)
    if validation > 0 and len(held) == 0:
        raise ValueError(
            f"{name}: validation={validation} of {len(source.train)} training rows leaves no "
            "validation rows; expected at least one. Use a larger share, or 0 to go without."
        )

    raw, facts = standardisation(source.x, train, source.divide_by)
    mean, std = (torch.tensor(facts[name], dtype=torch.float64) for name in ("mean", "std"))
    preprocessing: dict[str, Any] = {"inputs": facts}
    if source.columns is not None:
        preprocessing["columns"] = source.columns
    if classification:
        y = source.y
        preprocessing["target"] = {"labels": source.labels}
    else:
        y_mean, y_std = _statistics(source.y[train])
        y = ((source.y - y_mean) / y_std).float()
        preprocessing["target"] = {"mean": y_mean.item(), "std": y_std.item()}

    def split(rows: Tensor) -> Split:
        x = raw[rows]
        # float32 is exact enough for a byte, and half the memory; a table's columns may be far
        # from zero, so subtract their means in float64.
        x = x.float() if x.dtype == torch.uint8 else x.double()
        return Split(x.div_(source.divide_by).sub_(mean).div_(std).float(), y[rows])

    return Dataset(
        name=name,
        task="classification" if classification else "regression",
        train=split(train),
        validation=split(held),
        test=split(source.test),
        classes=len(source.labels) if source.labels is not None else None,
        feature_names=source.feature_names,
        preprocessing=preprocessing,
        variables=source.variables,
        target=source.target,
        notes=source.notes,
    )


def standardisation(
    x: Tensor, train: Tensor, divide_by: float = 1.0
) -> tuple[Tensor, dict[str, Any]]:
    """The rows with missing numbers filled, and how they become a network's inputs.

    Args:
        x: raw rows.
            Shape: (N, ...).
        train: numbers of the rows that decide.
        divide_by: the largest value of a pixel; 1 for tables.

    Returns:
        The rows, and ``["inputs"]`` of a `Dataset`'s ``preprocessing``.
    """
    raw, fill = _filled(x, train)
    mean, std = _statistics(raw[train])
    facts: dict[str, Any] = {"divide_by": divide_by, "mean": mean.tolist(), "std": std.tolist()}
    if fill is not None:
        facts["fill"] = fill
    return raw, facts


def _filled(x: Tensor, train: Tensor) -> tuple[Tensor, list[float] | None]:
    """A table with medians of training rows for missing numbers, and these; None without any."""
    if not x.is_floating_point() or not bool(x.isnan().any()):
        return x, None
    from sklearn.impute import SimpleImputer

    imputer = SimpleImputer(strategy="median", keep_empty_features=True).fit(x[train].numpy())
    return torch.as_tensor(imputer.transform(x.numpy())), imputer.statistics_.tolist()


def _statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """What to subtract and divide by, in float64.

    A table's columns, one number each: mean and standard deviation (population), the latter 1 for
    what is constant. Images, one number for all: 0 and 1, so that they lie in [0, 1] with black at
    0. A centred image would have no zeros: every weight of a pixel that is always black would add
    its posterior's noise to all units, and pay for it in the KL.
    """
    if values.dtype == torch.uint8:
        return torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    mean, std = values.mean(0), values.std(0, correction=0)
    constant = values.amin(0) == values.amax(0)  # its std is a rounding error, not always 0
    return mean, torch.where(constant, 1.0, std)
