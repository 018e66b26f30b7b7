"""A network as an ONNX file, and how ONNX Runtime runs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .check import example_inputs
from .program import export_program

__all__ = ["onnx_available", "onnx_runner", "require_onnx", "write_onnx"]


def _missing() -> list[str]:
    packages = ("onnx", "onnxscript", "onnxruntime")
    return [name for name in packages if not importlib.util.find_spec(name)]


def onnx_available() -> bool:
    """Whether the packages of the extra ``onnx`` are installed."""
    return not _missing()


def require_onnx() -> None:
    """Raise ``ModuleNotFoundError``, which says what to install, unless ONNX is all there."""
    missing = _missing()
    if missing:
        raise ModuleNotFoundError(
            f"ONNX files need {', '.join(missing)}: pip install 'pyro-sparse[onnx]'",
            name=missing[0],
        )


def write_onnx(net: nn.Module, example: Tensor, path: str | Path) -> None:
    """Write ``net`` in eval mode as one ONNX file, input ``input``, output ``output``.

    The first dimension of the input is free; so is the output's, if the network says so. The file
    holds no text of the machine that wrote it, such as the paths of source files.

    :param example: an input ``(any batch, ...)``.
    :raises ModuleNotFoundError: without the packages of the extra ``onnx``.
    :raises ValueError: where the network cannot be exported.
    """
    require_onnx()
    program = export_program(net, example)
    try:
        exported: Any = torch.onnx.export(
            program,
            (example_inputs(example, 2),),
            dynamo=True,
            input_names=["input"],
            output_names=["output"],
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # whatever the exporter raises
        raise ValueError(f"{type(net).__name__} cannot be written as ONNX: {error}") from error
    for part in (exported.model.graph, *exported.model.functions.values()):
        for node in part.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
    exported.save(str(path))


def onnx_runner(path: str | Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A function that runs an ONNX file of :func:`write_onnx` in ONNX Runtime on the CPU.

    :param threads: for the work inside of one operation.
    """
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])

    return run
