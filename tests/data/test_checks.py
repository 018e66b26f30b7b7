"""check: good data pass, each kind of bad data has its error."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_sparse.data import check

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
TARGETS = torch.linspace(-1.0, 1.0, 6)
IMAGES = torch.zeros(6, 1, 4, 4)


def changed(tensor: Tensor, index: Any, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("x", "y", "classes", "features"),
    [
        (X, LABELS, 3, 3),
        (X, LABELS.float(), 3, None),
        (X.double(), TARGETS, None, (3,)),
        (X, LABELS, None, 3),
        (IMAGES, LABELS, 10, (1, 4, 4)),
    ],
)
def test_accepts_good_data(x: Tensor, y: Tensor, classes: int | None, features: Any) -> None:
    check(x, y, classes=classes, features=features)


@pytest.mark.parametrize(
    ("x", "y", "classes", "features", "message"),
    [
        (X[:, 0], LABELS, 3, None, r"x of shape \(N, features...\), but x has shape \(6,\)"),
        (X, TARGETS[:, None], None, 3, r"y has shape \(6, 1\); use y.squeeze\(-1\)"),
        (X, LABELS[:5], 3, 3, r"as many rows in x as in y, .*\(6, 3\), .*\(5,\)"),
        (X[:0], LABELS[:0], 3, 3, r"empty \(x has shape \(0, 3\)"),
        (X[:, :0], LABELS, 3, None, r"empty \(x has shape \(6, 0\)"),
        (X, LABELS, 3, 4, r"rows of shape \(4,\), .* rows of \(3,\); choose other columns"),
        (IMAGES, LABELS, 3, (3, 4, 4), r"rows of shape \(3, 4, 4\), .* rows of \(1, 4, 4\)"),
        (X.long(), LABELS, 3, 3, r"floating-point x, got torch.int64 .* x.float\(\)"),
        (
            changed(X, (slice(2, 4), 1), float("nan")),
            LABELS,
            3,
            3,
            r"2 of 18 values of x \(shape \(6, 3\)\) .*, the first \(nan\) in row 2, column 1;",
        ),
        (
            changed(IMAGES, (5, 0, 2, 3), float("-inf")),
            LABELS,
            3,
            None,
            r"1 of 96 values of x .*, the first \(-inf\) in row 5, column 0, 2, 3;",
        ),
        (
            X,
            changed(TARGETS, 4, float("inf")),
            None,
            3,
            r"1 of 6 values of y .*, the first \(inf\) in row 4;",
        ),
        (X, changed(TARGETS, 0, float("nan")), 3, 3, "1 of 6 values of y"),
        (
            X,
            LABELS,
            2,
            3,
            r"2 of 6 labels lie outside the 2 classes, the first \(2\) in row 2; .*0..1",
        ),
        (X, LABELS - 1, 3, 3, r"2 of 6 labels lie outside .* \(-1\) in row 0; .*Renumber"),
        (X, LABELS + 0.5, 3, 3, r"6 of 6 labels are no whole numbers, the first \(0.5\) in row 0"),
    ],
)
def test_rejects_bad_data(
    x: Tensor, y: Tensor, classes: int | None, features: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check(x, y, classes=classes, features=features, where="training set")
    assert str(error.value).startswith("training set: ")


@pytest.mark.parametrize("name", ["x", "y"])
def test_rejects_what_is_no_tensor(name: str) -> None:
    data: dict[str, Any] = {"x": X, "y": LABELS}
    data[name] = np.asarray(data[name])
    with pytest.raises(TypeError, match=f"expected {name} as a torch.Tensor, got ndarray"):
        check(**data, classes=3)


def test_whole_numbers_where_the_network_takes_them() -> None:
    check(X.long(), LABELS, classes=3, integers=True)
    with pytest.raises(ValueError, match=r"x of whole numbers, .* got torch.float32 .* x.long\(\)"):
        check(X, LABELS, classes=3, integers=True)
