"""What a network's layers cost, as a function of the units that are kept.

The multiplications of a layer, or of the two products within an attention, are a constant times the
entries of one dimension times those of another: rows and columns. Each of these dimensions has
some entries that always stay, and some for every unit. So a network's MACs are known for any masks
without making the smaller network; what no entry here stands for does not depend on the masks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .rules import (
    Step,
    attention,
    convolution,
    linear,
    matrix_product,
    multihead_attention,
    rule_of,
)
from .structure import Group, Product, Width
from .units import Value

if TYPE_CHECKING:
    from .trace import Analysis

__all__ = ["found_products"]

ONE = Width(1, {})
_Transposed = nn.modules.conv._ConvTransposeNd


def found_products(
    analysis: Analysis, groups: tuple[Group, ...], batch: int
) -> tuple[Product, ...]:
    """The products of an analysed network whose cost depends on the units of these groups.

    :param batch: inputs that the network was analysed with.
    """
    walk = analysis.walk
    units: dict[int, str] = {}
    for group in groups:
        if not group.prunable:
            continue
        if group.writers:
            writer = group.writers[0]
            use = next(
                use
                for use in walk.uses
                if (use.name, use.dim, use.kind) == (writer.parameter, writer.dim, "row")
            )
            labels = analysis.unit(use)[writer.entries(group.size)]
        else:
            labels = analysis.input_units()
        units |= dict.fromkeys(labels.tolist(), group.name)
    sizes = {group.name: group.size for group in groups}

    def width(labels: Tensor, entries: int) -> Width:
        """Of a dimension of so many entries, with a label each, or one for all of them."""
        flat = walk.atoms.find(labels.reshape(-1)).tolist()
        names = Counter(units[label] for label in flat if label in units)
        if entries % max(len(flat), 1) or any(n % sizes[name] for name, n in names.items()):
            return Width(entries, {})
        each = entries // max(len(flat), 1)
        inside = {name: each * count // sizes[name] for name, count in names.items()}
        return Width(each * (len(flat) - sum(names.values())), inside)

    products = [
        replace(product, factor=product.factor // batch)
        for step in analysis.steps
        for product in _of_step(step, width)
        if product.rows.units or product.columns.units
    ]
    return tuple(products)


def _of_step(step: Step, width: Callable[[Tensor, int], Width]) -> Iterator[Product]:
    """The products of one node, for all inputs of the batch."""
    rule = rule_of(step.node, step.module)
    if rule in (linear, convolution):
        yield from _of_layer(step, width)
    elif rule is multihead_attention:
        yield from _of_attention_layer(step, width)
    elif rule in (attention, matrix_product):
        yield from _of_heads(step, width)


def _along(value: Value, dim: int, width: Callable[[Tensor, int], Width]) -> Width:
    return width(value.labels.movedim(dim, 0).flatten(1)[:, 0], value.shape[dim])


def _of_layer(step: Step, width: Callable[[Tensor, int], Width]) -> Iterator[Product]:
    module, output, source = step.module, step.walk.values[step.node], step.source
    if isinstance(module, nn.Linear):
        last = len(output.shape) - 1
        positions = output.shape[:-1].numel()
        yield Product(positions, _along(output, last, width), _along(source, last, width))
        return
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | _Transposed)
    transposed = isinstance(module, _Transposed)
    shape = (source if transposed else output).shape
    factor = shape[0] * shape[2:].numel() * math.prod(module.kernel_size)
    rows, columns = _along(output, 1, width), _along(source, 1, width)
    if module.groups == 1:
        yield Product(factor, rows, columns)
    else:  # each channel meets those of its own group, which stays or goes as a whole
        channels = columns if transposed else rows
        yield Product(factor * module.weight.shape[1], channels, ONE)


def _of_attention_layer(step: Step, width: Callable[[Tensor, int], Width]) -> Iterator[Product]:
    module = step.module
    assert isinstance(module, nn.MultiheadAttention)
    read = [read.labels for read in step.walk.reads if read.node is step.node]
    if not read:
        return  # it keeps its heads
    attended, output = width(read[-1], len(read[-1])), step.walk.values[step.node][0]
    sources: list[Value] = [step.walk.values[node] for node in step.node.args]  # type: ignore[index]
    query, key, _ = sources
    last = len(output.shape) - 1
    for value in sources:
        yield Product(value.shape[:-1].numel(), attended, _along(value, last, width))
    tokens = key.shape[1 if module.batch_first else 0] if last == 2 else key.shape[0]
    positions = query.shape[:-1].numel()
    yield Product(2 * positions * tokens, attended, ONE)
    yield Product(positions, _along(output, last, width), attended)


def _of_heads(step: Step, width: Callable[[Tensor, int], Width]) -> Iterator[Product]:
    output, (first, second) = step.walk.values[step.node], step.inputs[:2]
    tokens, inner = first.shape[-2:]
    each = tokens * inner * output.shape[-1]
    if rule_of(step.node, step.module) is attention:
        each = tokens * second.shape[-2] * (inner + output.shape[-1])
    heads = output.labels.flatten(-2)[..., 0].reshape(-1)
    everywhere = output.shape[:-2].numel() // len(heads)
    yield Product(each * everywhere, width(heads, len(heads)), ONE)
