"""A network as a torch.export program: a ``.pt2`` file, without a pickle in it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten_with_path

from pyro_sparse.graph import evaluating
from pyro_sparse.graph.capture import without_traces
from pyro_sparse.inputs import Inputs

from .archive import FormatError, checked, hollowed
from .check import Runner, outputs_of, tensors_only

__all__ = ["Exported", "export_program", "program_runner", "read_program", "write_program"]

# What torch notes on operations: source files, classes and lines of the machine that wrote them.
NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node")


@dataclass(frozen=True)
class Exported:
    """A network as a program.

    program: of torch.export.
    inputs: the tensors with which it is called: keyword inputs that are no tensors are part of it.
    names: of the inputs.
    outputs: names, as `outputs_of` has them.
    fixed: why it runs at the batch size of ``inputs`` only; empty where that is free.
    """

    program: torch.export.ExportedProgram
    inputs: Inputs
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    fixed: str = ""


def export_program(net: nn.Module, example: Inputs) -> Exported:
    """``net`` in eval mode as a program; its batch size is free where the network allows that.

    Outputs are a tensor, or a flat tuple or dictionary of tensors: what else a network returns,
    such as a cache, is left out, and whoever reads the program needs no class of the network's
    library.

    Args:
        example: rows, on the CPU.

    Raises:
        ValueError: where the network cannot be exported.
    """
    # A copy, since hooks come on it, and forward may set attributes.
    net = copy.deepcopy(net).cpu()
    inputs = tensors_only(example)
    constants = {k: v for k, v in example.kwargs.items() if k not in inputs.kwargs}
    names = _names(net, inputs)
    if constants:
        net.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, **constants}), with_kwargs=True
        )
    with _whole(), evaluating(net), without_traces(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            first = inputs.call(net)
        except Exception as error:  # whatever the network raises
            raise ValueError(
                f"{type(net).__name__} does not run on inputs of shape {inputs.described}: {error}"
            ) from error
        outputs = tuple(outputs_of(first))
        if not outputs:
            raise ValueError(f"{type(net).__name__} returns no tensor, but {type(first).__name__}")
        if not isinstance(first, Tensor):
            net.register_forward_hook(lambda module, args, result: _flat(result))
        program, fixed = _exported(net, inputs)
    return Exported(program, inputs, names, outputs, fixed)


def _flat(outputs: Any) -> Any:
    found = outputs_of(outputs)
    flat = isinstance(outputs, tuple | list) and all(isinstance(v, Tensor) for v in outputs)
    return tuple(found.values()) if flat else found


def _names(net: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """``input`` for the only one; otherwise as forward names them."""
    if len(inputs.tensors) == 1:
        return ("input",)
    parameters = list(inspect.signature(net.forward).parameters)
    names = []
    for path, value in tree_flatten_with_path((inputs.args, inputs.kwargs))[0]:
        keys: tuple[Any, ...] = path
        which, first, *rest = keys
        if isinstance(value, Tensor):
            place: Any = getattr(first, "key", getattr(first, "idx", 0))
            if which.idx == 0:
                place = parameters[place] if place < len(parameters) else f"input_{place}"
            more = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in rest]
            names.append("_".join([place, *more]))
    return tuple(names)


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Torch's fused transformer layer stays apart: neither ONNX nor other versions know it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _exported(net: nn.Module, inputs: Inputs) -> tuple[torch.export.ExportedProgram, str]:
    def export(given: Inputs, **more: Any) -> torch.export.ExportedProgram:
        return torch.export.export(net, given.args, given.kwargs, strict=False, **more)

    # A batch of one would be taken for a constant. A named dimension, since an automatic one is
    # fixed without a word where the network fixes it.
    several = inputs.rows([0, 0]) if inputs.batch == 1 else inputs
    several = several.map(lambda value: value.clone())  # sizes go by tensor: no two the same
    batch, shapes = torch.export.Dim("batch"), torch.export.ShapesCollection()
    for value in several.tensors:
        if value.ndim and len(value) == several.batch:
            shapes[value] = {0: batch}
    try:
        dynamic = shapes.dynamic_shapes(net, several.args, several.kwargs)
        return export(several, dynamic_shapes=dynamic), ""
    except Exception as error:  # whatever the network's code does with a size
        fixed = _first_line(error)
    try:
        return export(inputs), fixed
    except Exception as error:
        raise ValueError(
            f"{type(net).__name__} cannot be exported: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def write_program(exported: Exported, path: str | Path, *, hollow: bool = False) -> None:
    """Write a program as a ``.pt2`` file.

    The file is a zip: the operations as JSON, the weights as plain bytes. torch would add its
    example inputs as a pickle, source paths as text and conditions on sizes as Python; they are
    left out.

    Args:
        hollow: without the weights' numbers.

    Raises:
        ValueError: where this version of torch writes anything but that.
    """
    program = exported.program
    program._example_inputs = None
    program._guards_code = []
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                for note in NOTES:
                    node.meta.pop(note, None)
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, made)
    content = hollowed(made.getvalue()) if hollow else made.getvalue()
    Path(path).write_bytes(checked(content, hollow=hollow))


def read_program(content: bytes, *, hollow: bool = False) -> nn.Module:
    """The network in a ``.pt2`` file, read as data: see :mod:`.archive`.

    Raises:
        FormatError: where there is anything else in it, or torch cannot make a network of it.
    """
    made = io.BytesIO(checked(content, hollow=hollow))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(made).module()
    except Exception as error:  # whatever torch raises
        raise FormatError(
            f"torch {torch.__version__} does not read model.pt2: {_first_line(error)}"
        ) from error


def program_runner(path: str | Path) -> Runner:
    """A function that runs a ``.pt2`` file."""
    module = read_program(Path(path).read_bytes())

    def run(inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad():
            return outputs_of(tensors_only(inputs).call(module))

    return run
