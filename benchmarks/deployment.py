"""How much faster LeNet-5-Caffe gets by removing units: dense beside compact, two runtimes.

Random weights and masks, since neither decides the time. Writes an exported folder with every
format, bench.json and bench.png; the figures of docs/deployment.md come from here.

Usage: python benchmarks/deployment.py FOLDER [--keep 5-10-16] [--seconds 5]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pyro_sparse import experiment, report
from pyro_sparse.export import compact_network, equivalence, save
from pyro_sparse.graph import groups
from pyro_sparse.nets import lenet5_caffe


def export(folder: Path, keep: tuple[int, int, int]) -> float:
    """Write the pruned network; largest difference from the masked one."""
    torch.manual_seed(0)
    net = lenet5_caffe()
    inputs = torch.randn(8, 1, 28, 28)
    graph = groups(net, inputs)
    masks = {}
    for name, count in zip(("conv1", "conv2", "fc1"), keep, strict=True):
        masks[name] = torch.zeros(graph[name].size, dtype=torch.bool)
        masks[name][torch.randperm(graph[name].size)[:count]] = True
    small = compact_network(net, graph, {}, masks)
    save(small, folder, onnx=True, pt2=True, example=inputs, dense=net, overwrite=True)
    return equivalence(net, graph, dict(net.named_parameters()), masks, small, inputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", default="5-10-16", help="units of conv1, conv2 and fc1")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each batch size")
    arguments = parser.parse_args()
    first, second, third = map(int, arguments.keep.split("-"))
    with torch.no_grad():
        difference = export(arguments.folder, (first, second, third))
    print(f"masked against compact: {difference:.1e}")
    report.print_bench(experiment.bench(arguments.folder, seconds=arguments.seconds))
