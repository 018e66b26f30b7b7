"""How much faster a network gets by removing units: dense beside compact, two runtimes.

LeNet-5-Caffe at given widths, or VGG with a share of the channels of each layer, aligned. Random
weights and masks, since neither decides the time. Writes an exported folder with every format,
bench.json and bench.png; the figures of docs/deployment.md come from here.

Usage::

    python -m benchmarks.deployment FOLDER [--keep 5-10-16] [--seconds 5]
    python -m benchmarks.deployment FOLDER --net vgg --share 0.6 --align 16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from pyro_sparse import nets
from pyro_sparse.export import compact_network, equivalence, save
from pyro_sparse.export.compact import readmitting
from pyro_sparse.graph import Graph, groups
from pyro_sparse.runs import deployment, terminal


def counts(graph: Graph, options: argparse.Namespace) -> dict[str, int]:
    """How many units of every prunable layer stay."""
    layers = [group for group in graph if group.prunable and group.writers]
    if options.net == "lenet5-caffe":
        widths = map(int, options.keep.split("-"))
        return {group.name: width for group, width in zip(layers, widths, strict=True)}
    return {group.name: round(options.share * group.size) for group in layers}


def export(net: nn.Module, inputs: torch.Tensor, options: argparse.Namespace) -> float:
    """Write the pruned network; largest difference from the masked one."""
    graph = groups(net, inputs)
    masks = {}
    for name, count in counts(graph, options).items():
        masks[name] = torch.zeros(graph[name].size, dtype=torch.bool)
        masks[name][torch.randperm(graph[name].size)[:count]] = True
    small = compact_network(net, graph, {}, masks, align=options.align)
    save(small, options.folder, example=inputs, dense=net, overwrite=True, int8=True)
    masks = readmitting(masks, small)
    return equivalence(net, graph, dict(net.named_parameters()), masks, small, inputs)


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
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = (1, 28, 28) if options.net == "lenet5-caffe" else (3, 32, 32)
    net = nets.build(options.net, shape, 10).eval()
    with torch.no_grad():
        difference = export(net, torch.randn(8, *shape), options)
    print(f"masked against compact: {difference:.1e}")
    terminal.print_bench(deployment.bench(options.folder, seconds=options.seconds))


if __name__ == "__main__":
    main()
