"""How much CPU time a network of a given quality takes: MNIST, 784-400-400-10.

Trains on one thread and prints, along the way, the CPU seconds that training has taken (all of it
but the scoring of this table), and of the compact network at that moment: units kept, and accuracy
on the validation part and on the test set. What else the machine does moves CPU seconds, too, so
they also stand in epochs of the dense network, of which a few steps are timed after every epoch.
Each argument is a model of the zoo with its settings, as `pyro-sparse compare` takes them::

    python -m benchmarks.time_to_quality --data-root DIR                # the defaults, SS-GHS
    python -m benchmarks.time_to_quality ss-ghs:epochs=30 --data-root DIR

Settings are chosen by the validation columns, never by the test set. The last epoch counts.
docs/training.md has the figures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyro_sparse import compact, data, infer
from pyro_sparse.posterior import Posterior, accuracy
from pyro_sparse.runs import experiment, settings

from .step import Dense, Machine, Times, timed

DENSE_STEPS = 5
"""Timed after every epoch."""


class Scores:
    """Prints rows, and keeps the time that this takes out of the count.

    Args:
        posterior, dataset: what is trained, and on what.
        loader: the training data.
        every: epochs between the rows.
        last: epoch, which has a row, too.
    """

    def __init__(
        self,
        posterior: Posterior,
        dataset: data.Dataset,
        loader: data.Batches,
        every: int,
        last: int,
    ) -> None:
        self.posterior, self.dataset, self.loader = posterior, dataset, loader
        self.every, self.last = every, last
        self.dense = Dense(experiment.dense_network(posterior), "cpu")
        self.seconds = self.dense_epochs = 0.0
        self.started = time.process_time()

    def __call__(self, metrics: dict[str, Any]) -> None:
        own = time.process_time() - self.started
        self.seconds += own
        size = self.loader.batch_size
        x, y = self.loader.x[:size], self.loader.y[:size]
        times = Times()
        for _ in range(DENSE_STEPS):
            timed(Machine("cpu", quick=True), partial(self.dense.step, x, y), times)
        self.dense_epochs += own / (statistics.median(times.cpu) * len(self.loader))
        epoch = metrics["epoch"]
        if epoch % self.every == 0 or epoch == self.last:
            self.print_row(epoch)
        self.started = time.process_time()

    def print_row(self, epoch: int) -> None:
        """Scores of the compact network."""
        posterior, held_out = self.posterior, self.dataset.validation
        keep = posterior.keep()
        small = compact(posterior, keep)
        with torch.no_grad():
            found = [
                accuracy(small(part.x).softmax(-1), part.y)
                for part in (held_out, self.dataset.test)
            ]
        batches = data.Batches(held_out.x, held_out.y, 1000, shuffle=False)
        bound = infer.lower_bound(posterior.model, posterior.guide, batches, draws=4)
        groups = posterior.summary().groups
        kept = "-".join(str(group.kept) for group in groups)
        undecided = sum(group.undecided for group in groups)
        print(
            f"{epoch:5} {self.seconds:8.1f} {self.dense_epochs:12.1f} {kept:>9} {undecided:9} "
            f"{bound.value / posterior.model.num_data:10.4f} {found[0]:10.2%} {found[1]:7.2%}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("entries", nargs="*", default=["ss-ghs"], metavar="MODEL[:SETTING=VALUE]")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=5, help="epochs between the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    for entry in options.entries:
        name, given = settings.parse_entry(entry)
        chosen = settings.settings_for(name, options.data, strict=True, seed=options.seed, **given)
        dataset = experiment.load_data(chosen, options.data_root)
        model, guide = experiment.build(chosen, dataset)
        split = dataset.train
        loader = data.Batches(split.x, split.y, chosen.batch_size, seed=chosen.seed)
        print(f"\n{entry}: {chosen.epochs} epochs, batch {chosen.batch_size}, seed {chosen.seed}")
        print("epoch  seconds dense epochs      kept undecided ELBO/datum validation    test")
        scores = Scores(Posterior(model, guide), dataset, loader, options.every, chosen.epochs)
        infer.fit(
            model, guide, loader, on_epoch=scores,
            **experiment.fit_options(chosen, chosen.epochs, len(split), False),
        )  # fmt: skip


if __name__ == "__main__":
    main()
