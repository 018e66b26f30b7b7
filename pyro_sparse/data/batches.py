"""Mini-batches of tensors that are already in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.inputs import Example, Several, as_rows
from pyro_sparse.ranges import whole

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def crop_and_flip(padding: int = 4) -> Augmentation:
    """Standard augmentation of small images, for `Batches`.

    Each image is padded with zeros, cropped to its size at a random place, and mirrored with
    probability ½ (He et al., CVPR 2016, section 4.2). One gather a batch, where the images lie.

    Args:
        padding: pixels on each side.

    Returns:
        A function of images (N, channels, height, width) and a CPU generator.
    """
    if padding < 0:
        raise ValueError(f"expected a padding of at least 0 pixels, got {padding}")

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        count, channels, height, width = x.shape
        top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
        flip = torch.rand(count, 1, generator=generator) < 0.5
        rows, columns = torch.arange(height), torch.arange(width)
        columns = torch.where(flip, columns.flip(0), columns)
        padded = torch.nn.functional.pad(x, [padding] * 4).flatten(2)
        # Where each pixel comes from, the same in all channels: four times as fast as indexing.
        index = (top + rows).unsqueeze(2) * (width + 2 * padding) + (left + columns).unsqueeze(1)
        index = index.reshape(count, 1, -1).expand(-1, channels, -1)
        return padded.gather(2, index.to(x.device)).reshape(x.shape)

    return augment


class Batches:
    """Iterates over ``(x[i], y[i])``, one pass an epoch, in a new order each time.

    For data that fit in memory this is what a ``DataLoader`` does, without a Python call a row:
    one permutation an epoch, one ``index_select`` a batch, on the device where the tensors lie.
    The order is a function of the generator alone, whatever the device and the global seed.

    Args:
        x: features; or a tuple or dictionary of tensors, for networks of several inputs, whose
            batches are tuples or dictionaries, too.
            Shape: (N, ...).
        y: labels or targets.
            Shape: (N, ...).
        batch_size: rows a batch; the last one is smaller unless ``drop_last``.
        shuffle: a new permutation each epoch; otherwise the rows in order.
        seed: seeds the loader's own generator; unused when ``generator`` is given.
        generator: a CPU generator to draw the permutations from.
        drop_last: leave out a last batch with fewer than ``batch_size`` rows.
        augment: changes each batch of ``x``, such as `crop_and_flip`; it draws from the same
            generator.

    Raises:
        ValueError: x and y differ in length, the batch size is below one, or there would be no
            batch at all.
    """

    def __init__(
        self,
        x: Example,
        y: Tensor,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        augment: Augmentation | None = None,
    ) -> None:
        rows: Any = as_rows(x)
        for name, value in (("x", rows), ("y", y)):
            if isinstance(value, Several):
                continue
            if not isinstance(value, Tensor) or not value.dim():
                raise ValueError(
                    f"Batches: expected {name} as a tensor with a row for each example, got "
                    f"{f'shape {tuple(value.shape)}' if isinstance(value, Tensor) else repr(value)}"
                )
        if len(rows) != len(y):
            raise ValueError(
                f"Batches: expected as many rows in x as in y, but x has shape {tuple(rows.shape)} "
                f"and y has shape {tuple(y.shape)}."
            )
        whole(batch_size=batch_size)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise ValueError(f"Batches: expected generator, a torch.Generator, got {generator!r}")
        if not isinstance(seed, int):
            raise ValueError(f"Batches: expected seed to be a whole number, got {seed!r}")
        self.x = rows
        self.y = y
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.augment = augment
        self.generator = torch.Generator().manual_seed(seed) if generator is None else generator
        self._rank, self._ranks = 0, 1
        if len(self) == 0:
            advice = (
                "Use a smaller batch_size or drop_last=False." if len(rows) else "Check the data."
            )
            raise ValueError(
                f"Batches: no batch to give: {len(rows)} rows, batch_size={batch_size}, "
                f"drop_last={drop_last}. {advice}"
            )

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.x), self.batch_size)
        return whole + (rest >= self._ranks and not self.drop_last)

    def shard(self, rank: int, ranks: int) -> Batches:
        """The share of one of several processes in every batch, all of one size.

        Together they see the batches of this loader, where ``batch_size`` is a multiple of
        ``ranks``; otherwise the odd rows of a batch, others in each epoch, are left out. The order
        is this loader's own, and goes on where it is.

        Args:
            rank: of the process, in 0..ranks-1.
            ranks: number of processes, each of which has a loader of the same data and seed.

        Raises:
            ValueError: there is no such rank, or a batch has fewer rows than there are processes.
        """
        if not 0 <= rank < ranks:
            raise ValueError(f"Batches: expected a rank in 0..{ranks - 1}, got {rank}.")
        if min(self.batch_size, len(self.x)) < ranks:
            raise ValueError(
                f"Batches: expected at least one row of every batch for each of {ranks} processes, "
                f"got batch_size={self.batch_size} and {len(self.x)} rows. Use a larger batch_size."
            )
        part = copy.copy(self)
        part._rank, part._ranks = rank, ranks
        return part

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        size = len(self.x)
        rows = (
            torch.randperm(size, generator=self.generator) if self.shuffle else torch.arange(size)
        )
        for batch in rows.to(self.x.device).split(self.batch_size)[: len(self)]:
            share = len(batch) // self._ranks
            batch = batch[self._rank * share : (self._rank + 1) * share]
            x, y = self.x.index_select(0, batch), self.y.index_select(0, batch)
            x = x if self.augment is None else self.augment(x, self.generator)
            yield (x.value if isinstance(x, Several) else x), y

    def state_dict(self) -> dict[str, Tensor]:
        """What decides the order of the epochs to come (tensors only, so safetensors can hold it).

        An epoch's permutation is drawn when the epoch starts: read the state between epochs.
        """
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the order of the loader that gave this ``state_dict``."""
        self.generator.set_state(state["generator"].cpu())
