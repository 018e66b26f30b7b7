"""A network as an ONNX file, in int8 if asked for, and how ONNX Runtime runs it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.inputs import Inputs

from .check import Runner
from .program import Exported

__all__ = ["onnx_available", "onnx_runner", "require_onnx", "write_int8", "write_onnx"]

CALIBRATION_BATCH = 64


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


def write_onnx(exported: Exported, path: str | Path) -> None:
    """Write a program as one ONNX file, with the program's names for inputs and outputs.

    The file holds no text of the machine that wrote it, such as the paths of source files.

    Raises:
        ModuleNotFoundError: without the packages of the extra ``onnx``.
        ValueError: where the network cannot be exported.
    """
    require_onnx()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: Any = torch.onnx.export(
                exported.program,
                exported.inputs.args,
                kwargs=exported.inputs.kwargs,
                dynamo=True,
                input_names=list(exported.names),
                output_names=list(exported.outputs),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # whatever the exporter raises
        said = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ValueError(f"the network cannot be written as ONNX: {said}") from error
    for part in (made.model.graph, *made.model.functions.values()):
        for node in part.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
    made.save(str(path))


def onnx_runner(
    path: str | Path, names: Sequence[str], outputs: Sequence[str], threads: int = 1
) -> Runner:
    """A function that runs an ONNX file of :func:`write_onnx` in ONNX Runtime on the CPU.

    Args:
        names: of the inputs, in the order of their tensors.
        outputs: names.
        threads: for the work inside of one operation.
    """
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    read = {given.name for given in session.get_inputs()}

    def run(inputs: Inputs) -> dict[str, Tensor]:
        values = session.run(None, _arrays(inputs, names, read))
        return {name: torch.from_numpy(v) for name, v in zip(outputs, values, strict=True)}

    return run


def _arrays(inputs: Inputs, names: Sequence[str], read: set[str]) -> dict[str, Any]:
    """What a session takes; inputs that the network does not read have gone from its file."""
    tensors = zip(names, inputs.tensors, strict=True)
    return {name: value.numpy() for name, value in tensors if name in read}


def write_int8(
    source: str | Path, path: str | Path, rows: Inputs, names: Sequence[str], batch: int | None
) -> None:
    """Write an ONNX file in int8: static quantisation by ONNX Runtime, a scale a channel.

    Weights and activations are 8-bit numbers between QuantizeLinear and DequantizeLinear nodes. The
    activations' ranges are those that ``rows`` give.

    Args:
        source: file of :func:`write_onnx`.
        rows: inputs of training, whose ranges are taken.
        names: of the inputs.
        batch: the only batch size at which the network runs, or None.

    Raises:
        ValueError: where ONNX Runtime cannot quantise the network, or nothing in it.
    """
    require_onnx()
    import onnx
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    size = batch or CALIBRATION_BATCH
    model = onnx.load(str(source))
    read = {given.name for given in model.graph.input}
    parts = [
        _arrays(rows.rows(slice(start, start + size)), names, read)
        for start in range(0, rows.batch - (batch or 1) + 1, size)
    ]

    class Rows(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(parts)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            q.quantize_static(
                str(prepared),
                str(path),
                Rows(),
                quant_format=q.QuantFormat.QDQ,
                per_channel=True,
                # Unsigned by unsigned: processors without VNNI saturate sums of unsigned by signed
                # products, silently (7 % of the outputs of LeNet-5 in place of 1.6 %).
                activation_type=q.QuantType.QUInt8,
                weight_type=q.QuantType.QUInt8,
            )
        except Exception as error:  # whatever the quantiser raises
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"ONNX Runtime cannot quantise the network: {said}") from error
    if not any(node.op_type == "DequantizeLinear" for node in onnx.load(str(path)).graph.node):
        raise ValueError(
            "there is nothing in the network that ONNX Runtime quantises: no convolution or "
            "product with weights"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser writes advice about its own steps to the root logger."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
