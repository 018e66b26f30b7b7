"""Batches: every row once an epoch, a new order each, and the same order again after a resume."""

import pytest
import torch
from torch import Tensor

from pyro_sparse.data import Batches, crop_and_flip

X = torch.arange(20.0).reshape(10, 2)
Y = torch.arange(10)


def order(batches: Batches) -> list[int]:
    return [int(label) for _, y in batches for label in y]


def test_gives_rows_in_order_without_shuffling() -> None:
    batches = Batches(X, Y, 4, shuffle=False)
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert len(batches) == 3
    assert order(batches) == order(batches) == list(range(10))


def test_shuffles_anew_each_epoch_and_keeps_pairs_together() -> None:
    batches = Batches(X, Y, 3)
    first, second = order(batches), order(batches)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(10))
    for x, y in batches:
        torch.testing.assert_close(x, X[y])


def test_drop_last_leaves_out_the_small_batch() -> None:
    batches = Batches(X, Y, 4, drop_last=True)
    assert [len(y) for _, y in batches] == [4, 4]
    assert len(batches) == 2
    assert len(Batches(X, Y, 5, drop_last=True)) == len(Batches(X, Y, 5)) == 2


def test_order_depends_on_its_own_seed_only() -> None:
    expected = order(Batches(X, Y, 3, seed=1))
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    assert order(Batches(X, Y, 3, seed=1)) == expected
    assert order(Batches(X, Y, 3, generator=torch.Generator().manual_seed(1))) == expected
    assert order(Batches(X, Y, 3, seed=2)) != expected
    assert torch.equal(torch.get_rng_state(), before)


def test_state_resumes_the_order() -> None:
    batches = Batches(X, Y, 3, seed=1)
    order(batches)
    state = batches.state_dict()
    expected = [order(batches), order(batches)]
    resumed = Batches(X, Y, 3, seed=99)
    resumed.load_state_dict(state)
    assert [order(resumed), order(resumed)] == expected


@pytest.mark.parametrize(
    ("x", "y", "size", "drop_last", "message"),
    [
        (X, Y[:9], 4, False, r"x has shape \(10, 2\) and y has shape \(9,\)"),
        (X, Y, 0, False, "batch_size to be a whole number of at least 1, got 0"),
        (X, Y, 11, True, "10 rows, batch_size=11, drop_last=True. Use a smaller batch_size"),
        (X[:0], Y[:0], 4, False, "0 rows, .* Check the data"),
    ],
)
def test_errors(x: torch.Tensor, y: torch.Tensor, size: int, drop_last: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(x, y, size, drop_last=drop_last)


def test_crop_and_flip_moves_and_mirrors() -> None:
    # Every pixel its own number, so that each says where it came from.
    image = torch.arange(1.0, 1 + 2 * 6 * 5).reshape(1, 2, 6, 5)
    x = image.expand(64, -1, -1, -1)
    out = crop_and_flip(2)(x, torch.Generator().manual_seed(0))
    assert out.shape == x.shape
    places = set()
    for one in out:
        found = [
            (top, left, flipped)
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
            if torch.equal(one, shifted(image[0], top, left, flipped))
        ]
        assert len(found) == 1
        places |= set(found)
    assert len(places) > 20
    assert {flipped for *_, flipped in places} == {False, True}


def shifted(image: Tensor, top: int, left: int, flipped: bool) -> Tensor:
    crop = torch.nn.functional.pad(image, [2] * 4)[:, top : top + 6, left : left + 5]
    return crop.flip(2) if flipped else crop


def test_augmented_batches_repeat_and_resume() -> None:
    x, y = torch.randn(20, 1, 6, 6), torch.arange(20)

    def loader() -> Batches:
        return Batches(x, y, 8, seed=3, augment=crop_and_flip())

    first, second = list(loader()), list(loader())
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    one = loader()
    list(one)
    other = loader()
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))
    assert not torch.equal(first[0][0], x[first[0][1]])


def test_crop_and_flip_refuses_less_than_nothing() -> None:
    with pytest.raises(ValueError, match="padding of at least 0"):
        crop_and_flip(-1)


def test_shards_make_up_the_batches() -> None:
    whole = Batches(X, Y, 4, seed=2)
    shards = [Batches(X, Y, 4, seed=2).shard(rank, 2) for rank in range(2)]
    for _ in range(2):
        parts = zip(*shards, strict=True)
        for (x, y), ((x0, y0), (x1, y1)) in zip(whole, parts, strict=True):
            assert len(y0) == len(y1)
            assert torch.equal(torch.cat([y0, y1]), y)
            assert torch.equal(torch.cat([x0, x1]), x)


def test_shards_are_of_one_size_whatever_is_left_over() -> None:
    # 10 rows in batches of 4: 4, 4 and 2, which three processes cannot share.
    shards = [Batches(X, Y, 4).shard(rank, 3) for rank in range(3)]
    assert [len(shard) for shard in shards] == [2, 2, 2]
    given = [list(shard) for shard in shards]
    assert [[len(y) for _, y in one] for one in given] == [[1, 1]] * 3
    seen = [int(y) for one in given for _, y in one]
    assert len(set(seen)) == 6


def test_a_shard_goes_on_with_the_loaders_order() -> None:
    whole = Batches(X, Y, 5, seed=1)
    expected = Batches(X, Y, 5, seed=1)
    order(whole), order(expected)
    shard = whole.shard(0, 1)
    assert order(shard) == order(expected)
    assert all(torch.equal(v, whole.state_dict()[n]) for n, v in shard.state_dict().items())


def test_shards_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"rank in 0\.\.1, got 2"):
        Batches(X, Y, 4).shard(2, 2)
    with pytest.raises(ValueError, match="one row of every batch for each of 5 processes"):
        Batches(X, Y, 4).shard(0, 5)
