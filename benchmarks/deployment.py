"""How much faster a network gets by removing units: dense beside compact, two runtimes.

LeNet-5-Caffe at given widths, or VGG with a share of the channels of each layer, aligned. Random
weights and masks, since neither decides the time; with --data-root LeNet-5 learns MNIST before and
after the removal of its units of smallest rows, so that every file has a score. Writes an exported
folder with every format, bench.json and bench.png; the figures of docs/deployment.md come from it.

Usage::

    python -m benchmarks.deployment FOLDER [--keep 5-10-16] [--seconds 5]
    python -m benchmarks.deployment FOLDER --net vgg --share 0.6 --align 16
    python -m benchmarks.deployment FOLDER --data-root DATA [--epochs 2]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_sparse import data, nets
from pyro_sparse.export import compact_network, equivalence, save
from pyro_sparse.export._compact import readmitting
from pyro_sparse.graph import Graph, groups
from pyro_sparse.runs import deployment, terminal


def counts(graph: Graph, options: argparse.Namespace) -> dict[str, int]:
    """How many units of every prunable layer stay."""
    layers = [group for group in graph if group.prunable and group.writers]
    if options.net == "lenet5-caffe":
        widths = map(int, options.keep.split("-"))
        return {group.name: width for group, width in zip(layers, widths, strict=True)}
    return {group.name: round(options.share * group.size) for group in layers}


def learn(net: nn.Module, train: data.Split, epochs: int) -> nn.Module:
    """Adam on cross-entropy, with a learning rate that falls to 0."""
    net.train()
    steps = epochs * (len(train.x) // 128)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train.x))[: steps // epochs * 128].split(128):
            loss = nn.functional.cross_entropy(net(train.x[rows]), train.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def export(
    net: nn.Module, inputs: torch.Tensor, options: argparse.Namespace, dataset: data.Dataset | None
) -> float:
    """Write the pruned network; largest difference from the masked one."""
    graph = groups(net, inputs)
    masks = {}
    for name, count in counts(graph, options).items():
        masks[name] = torch.zeros(graph[name].size, dtype=torch.bool)
        rows = graph.rows(dict(net.named_parameters()), name)
        order = torch.randperm(len(rows)) if dataset is None else rows.norm(dim=1).argsort().flip(0)
        masks[name][order[:count]] = True
    small = compact_network(net, graph, {}, masks, align=options.align)
    masks = readmitting(masks, small)
    apart = equivalence(net, graph, dict(net.named_parameters()), masks, small, inputs)
    more: dict[str, Any] = {}
    if dataset is not None:
        with torch.enable_grad():
            learn(small, dataset.train, options.epochs)
        more = {
            "calibration": dataset.train.x[:512],
            "test": (dataset.test.x, dataset.test.y),
            "preprocessing": dataset.preprocessing,
        }
    save(small, options.folder, example=inputs, dense=net, overwrite=True, int8=True, **more)
    return apart


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--net", default="lenet5-caffe", choices=("lenet5-caffe", "vgg"))
    parser.add_argument("--keep", default="5-10-16", help="LeNet-5: units of conv1, conv2 and fc1")
    parser.add_argument("--share", type=float, default=0.6, help="VGG: channels that stay")
    parser.add_argument("--align", type=int, help="multiple that widths are brought up to")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each batch size")
    parser.add_argument("--data-root", type=Path, help="LeNet-5 learns the MNIST that lies there")
    parser.add_argument("--epochs", type=int, default=2, help="before the removal, and after it")
    options = parser.parse_args()
    torch.manual_seed(0)
    dataset = None if options.data_root is None else data.load("mnist", options.data_root)
    shape = (1, 28, 28) if options.net == "lenet5-caffe" else (3, 32, 32)
    net = nets.build(options.net, shape, 10).eval()
    if dataset is not None:
        learn(net, dataset.train, options.epochs)
    with torch.no_grad():
        inputs = torch.randn(8, *shape) if dataset is None else dataset.test.x[:64]
        difference = export(net, inputs, options, dataset)
    print(f"masked against compact: {difference:.1e}")
    config = json.loads((options.folder / "config.json").read_text())
    for name, score in config.get("test", {"scores": {}})["scores"].items():
        print(name, json.dumps(score), config["files"].get(f"model.{name}", ""))
    terminal.print_bench(deployment.bench(options.folder, seconds=options.seconds))


if __name__ == "__main__":
    main()
