"""A network as a torch.export program: a ``.pt2`` file, without a pickle in it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from pyro_sparse.graph import evaluating

from .check import example_inputs

__all__ = ["export_program", "program_runner", "write_program"]


def export_program(net: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """``net`` in eval mode as a program whose batch size is free.

    :param example: an input ``(any batch, ...)``.
    :raises ValueError: where the network cannot be exported, or works for one batch size only.
    """
    # Two inputs: a batch of one would be taken for a constant. A named dimension, since an
    # automatic one is fixed without a word where the network fixes it.
    inputs = example_inputs(example, 2)
    batch = torch.export.Dim("batch")
    with evaluating(net):
        try:
            return torch.export.export(net, (inputs,), dynamic_shapes=({0: batch},))
        except Exception as error:  # whatever torch.export raises
            raise ValueError(
                f"{type(net).__name__} cannot be exported with a free batch size: {error}"
            ) from error


def write_program(net: nn.Module, example: Tensor, path: str | Path) -> None:
    """Write ``net`` in eval mode as a ``.pt2`` file.

    The file is a zip: the operations as JSON, the weights as plain bytes. torch would add its
    example inputs as a pickle and source paths as text; both are left out.

    :param example: an input ``(any batch, ...)``.
    :raises ValueError: where the network cannot be exported, or this version of torch writes
        pickles nevertheless.
    """
    program = export_program(net, example)
    program._example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    torch.export.save(program, path)
    pickles = _pickles(Path(path).read_bytes())
    if pickles:
        raise ValueError(
            f"torch {torch.__version__} writes pickles into .pt2 files ({', '.join(pickles)}): "
            "install a later version, of which 2.15 does not, or leave this format out"
        )


def program_runner(path: str | Path) -> Callable[[Tensor], Tensor]:
    """A function that runs a ``.pt2`` file."""
    module = torch.export.load(path).module()

    def run(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return module(inputs)

    return run


def _pickles(content: bytes) -> list[str]:
    """Names of the pickles in a zip file, and in zip files within."""
    found = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            part = archive.read(name)
            if part[:4] == b"PK\x03\x04":
                found += [f"{name}/{inner}" for inner in _pickles(part)]
            elif part[:1] == b"\x80" and part[1:2] in b"\x02\x03\x04\x05" and part[-1:] == b".":
                found.append(name)  # protocol 2 and later, from first byte to last
    return found
