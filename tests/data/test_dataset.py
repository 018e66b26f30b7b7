"""Splitting and standardising, on raw data made here."""

import json

import pytest
import torch

from pyro_sparse.data.dataset import Source, hold_out, hold_out_test, prepare


def table(rows: int = 50, columns: int = 3) -> Source:
    generator = torch.Generator().manual_seed(0)
    x = 5.0 + 3.0 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    y = -40.0 + 7.0 * torch.randn(rows, generator=generator, dtype=torch.float64)
    numbers = torch.arange(rows)
    return Source(x, y, numbers[: rows - 10], numbers[rows - 10 :])


@pytest.mark.parametrize("size", [1, 2, 7, 100])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.9])
@pytest.mark.parametrize("classes", [None, 1, 3])
def test_hold_out_parts_the_rows(size: int, fraction: float, classes: int | None) -> None:
    rows = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:size]
    strata = None if classes is None else torch.arange(size) % classes
    kept, held = hold_out(rows, strata, fraction, seed=0)
    assert sorted(kept.tolist() + held.tolist()) == sorted(rows.tolist())
    strata_kept = 1 if strata is None else len(strata.unique())
    assert len(kept) >= strata_kept
    assert len(held) == min(round(size * fraction), size - strata_kept)


def test_hold_out_is_stratified() -> None:
    strata = torch.repeat_interleave(torch.arange(4), torch.tensor([500, 100, 17, 1]))
    _, held = hold_out(torch.arange(len(strata)), strata, 0.1, seed=0)
    assert strata[held].bincount(minlength=4).tolist() == [50, 10, 2, 0]


def test_hold_out_depends_on_the_seed_only() -> None:
    rows = torch.arange(100)
    _, held = hold_out(rows, None, 0.2, seed=1)
    torch.manual_seed(77)
    assert torch.equal(hold_out(rows, None, 0.2, seed=1)[1], held)
    assert not torch.equal(hold_out(rows, None, 0.2, seed=2)[1], held)


def test_statistics_come_from_the_training_rows_only() -> None:
    source = table()
    expected = prepare("table", source, 0.2, seed=0)
    train, _ = hold_out(source.train, None, 0.2, seed=0)
    other = torch.ones(len(source.x), dtype=torch.bool)
    other[train] = False
    x, y = source.x.clone(), source.y.clone()
    x[other], y[other] = 1e6, -1e6
    leaky = prepare("table", Source(x, y, source.train, source.test), 0.2, seed=0)
    assert leaky.preprocessing == expected.preprocessing
    assert torch.equal(leaky.train.x, expected.train.x)
    assert torch.equal(leaky.train.y, expected.train.y)


def test_preprocessing_tells_how_to_repeat_it() -> None:
    source = table()
    data = prepare("table", source, 0.2, seed=0)
    facts = json.loads(json.dumps(data.preprocessing))
    inputs, target = facts["inputs"], facts["target"]
    x = (source.x[source.test] / inputs["divide_by"] - torch.tensor(inputs["mean"])) / torch.tensor(
        inputs["std"]
    )
    torch.testing.assert_close(data.test.x, x.float())
    torch.testing.assert_close(
        data.test.y.double() * target["std"] + target["mean"],
        source.y[source.test],
        rtol=1e-6,
        atol=1e-5,
    )
    torch.testing.assert_close(data.train.x.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(data.train.x.std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(data.train.y.std(correction=0), torch.tensor(1.0))


def test_images_lie_in_the_unit_interval_with_black_at_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 1, 5, 5), generator=generator, dtype=torch.uint8)
    x[:, :, 0] = 0
    source = Source(
        x, torch.arange(40) % 4, torch.arange(30), torch.arange(30, 40), [0, 1, 2, 3], 255.0
    )
    data = prepare("images", source, 0.0, seed=0)
    inputs = data.preprocessing["inputs"]
    assert inputs == {"divide_by": 255.0, "mean": 0.0, "std": 1.0}
    torch.testing.assert_close(data.train.x, x[:30] / 255)
    assert data.train.x[:, :, 0].abs().max() == 0
    assert (data.input_shape, data.outputs, len(data.validation)) == ((1, 5, 5), 4, 0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 / 3])
def test_constant_features_become_zero(value: float) -> None:
    source = table()
    source.x[:, 1] = value
    source.y[:] = value
    data = prepare("table", source, 0.2, seed=0)
    assert data.preprocessing["inputs"]["std"][1] == 1.0
    assert data.preprocessing["target"]["std"] == 1.0
    assert data.train.x[:, 1].abs().max() < 1e-6
    assert data.test.y.abs().max() < 1e-6


def test_columns_far_from_zero_keep_their_digits() -> None:
    source = table()
    shifted = Source(source.x + 1e9, source.y, source.train, source.test)
    torch.testing.assert_close(
        prepare("table", shifted, 0.2, seed=0).train.x,
        prepare("table", source, 0.2, seed=0).train.x,
        rtol=1e-5,
        atol=1e-5,
    )


def test_validation_that_rounds_to_nothing_is_an_error() -> None:
    source = table(rows=14)
    with pytest.raises(ValueError, match=r"validation=0\.1 of 4 training rows leaves no"):
        prepare("table", source, 0.1, seed=0)


def test_to_moves_every_split() -> None:
    data = prepare("table", table(), 0.2, seed=0).to("meta")
    for split in (data.train, data.validation, data.test):
        assert split.x.is_meta
        assert split.y.is_meta


def test_fixed_test_rows_do_not_depend_on_the_global_seed() -> None:
    x, y = torch.zeros(50, 1), torch.arange(50) % 2
    train, test = hold_out_test(x, y)
    assert len(test) == 10
    assert y[test].sum() == 5
    torch.manual_seed(5)
    assert torch.equal(hold_out_test(x, y)[1], test)
    assert not torch.isin(train, test).any()
