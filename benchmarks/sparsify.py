"""Half of a trained network's MACs by `ps.sparsify`: a CNN on four classes of CIFAR-10, an MLP.

The CNN is trained first, from a zip file of images (``train/CLASS/*.jpg``, ``test/CLASS/*.jpg``),
shifted and mirrored at random; then `sparsify` gets the network and the same loader, 12 epochs, and
validation rows that training has not seen. Scores are on the test set::

    python -m benchmarks.sparsify --images cifar10-jpeg.zip
"""

from __future__ import annotations

import argparse
import io
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import pyro_sparse as ps
from pyro_sparse.likelihoods import Categorical
from pyro_sparse.posterior.calibration import predictive_scores

CLASSES = ("airplane", "automobile", "frog", "horse")


def images(path: Path, part: str, each: int) -> tuple[Tensor, Tensor]:
    """Some images of `CLASSES`, in [-1, 1], and their labels."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        x, y = [], []
        for label, name in enumerate(CLASSES):
            own = sorted(one for one in names if one.startswith(f"{part}/{name}/"))[:each]
            for one in own:
                x.append(np.array(Image.open(io.BytesIO(archive.read(one))).convert("RGB")))
                y.append(label)
    return torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(y)


def cnn() -> nn.Module:
    """Three convolutions with batch normalisation."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 4))


def train(net: nn.Module, loader: ps.data.Batches, epochs: int) -> None:
    """Plain training by Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    net.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        schedule.step()
    net.eval()


@torch.no_grad()
def report(name: str, net: nn.Module, small: ps.runs.sparsify.Sparsified, test: Any) -> None:
    """Scores on the test set."""
    x, y = test
    share = small.macs["compact"] / small.macs["trained"]
    print(f"{name}: {share:.1%} of the MACs, temperature {small.temperature:.2f}")
    own = {
        "trained": predictive_scores(Categorical(), [(net(x), {})], y),
        "ensemble": predictive_scores(
            Categorical(), small.posterior.draws(x), y, temperature=small.temperature
        ),
        "compact": predictive_scores(Categorical(), [(small.net(x), {})], y),
    }
    for which, scores in own.items():
        print(
            f"  {which:9} accuracy {scores['accuracy']:.4f}±{scores['accuracy_error']:.4f}", end=""
        )
        print(f"  ECE {scores['ece']:.4f}  NLL {scores['nll']:.4f}")
    print(*(f"  {caution}" for caution in small.cautions), sep="\n", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=Path)
    parser.add_argument("--each", type=int, default=2000, help="training images of a class")
    parser.add_argument("--epochs", type=int, default=15, help="of training the network")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    digits = ps.data.load("digits", validation=0.15)
    part, held = digits.train, digits.validation
    net = ps.nets.mlp([64, 100, 100, 10])
    loader = ps.data.Batches(part.x, part.y, 64)
    train(net, loader, 40)
    start = time.perf_counter()
    small = ps.sparsify(net, loader, validation=(held.x, held.y), progress=False)
    print(f"{time.perf_counter() - start:.0f} s")
    report("digits MLP", net, small, (digits.test.x, digits.test.y))
    if options.images is None:
        return
    x, y = images(options.images, "train", options.each + 250)
    place = torch.arange(len(x)) % (options.each + 250)
    inside = place < options.each
    loader = ps.data.Batches(x[inside], y[inside], 128, augment=ps.data.crop_and_flip())
    net = cnn()
    train(net, loader, options.epochs)
    start = time.perf_counter()
    small = ps.sparsify(net, loader, validation=(x[~inside], y[~inside]), progress=False)
    print(f"{time.perf_counter() - start:.0f} s")
    report("CNN", net, small, images(options.images, "test", 1000))


if __name__ == "__main__":
    main()
