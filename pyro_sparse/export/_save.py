"""Writes a network as a folder that runs without this package: ``.pt2``, ONNX, int8."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from pyro_sparse import nets
from pyro_sparse.inputs import Example, Inputs

from ._load import DENSE, FILES, FORMAT, FORMAT_VERSION
from .card import model_card
from .check import (
    BATCHES,
    Runner,
    described,
    device_of,
    example_rows,
    input_of,
    largest_difference,
    tensors_only,
)
from .onnx import onnx_runner, require_onnx, write_int8, write_onnx
from .program import Exported, export_program, program_runner, write_program
from .scores import Labelled, scored

__all__ = ["check_target", "save"]

# In the order in which they take their place. A folder without config.json says that it is
# incomplete: it goes first and comes last.
WRITTEN = (*FILES, "README.md", "config.json")
# What `bench` adds: true of the files that it measured only. And what earlier versions wrote.
GONE = ("bench.json", "bench.png", "load.py")


def save(
    small: nn.Module,
    directory: str | Path,
    *,
    onnx: bool = False,
    int8: bool = False,
    pt2: bool = True,
    example: Example | None = None,
    calibration: Example | None = None,
    test: Labelled | None = None,
    dense: nn.Module | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a network as a folder that runs without this package.

    ``model.pt2``, a ``torch.export`` program; ``model.safetensors``, the weights by the network's
    own names; ``config.json``, what they are, with a digest of every file; ``README.md``, a model
    card; ``model.onnx`` and ``model-int8.onnx`` on request. The files are made aside, read back in
    their own runtimes and compared with ``small`` on rows of the example at several batch sizes
    before they take their place; a failure leaves an existing folder as it was. No pickle and no
    code is written.

    The batch size is free where the network's code allows that; otherwise it is that of the
    example, and the model card says so.

    Args:
        small: the network, usually from :func:`~pyro_sparse.export.compact`. It is saved as it
            computes in eval mode.
        directory: made if missing.
        onnx: write ``model.onnx``; needs the extra ``onnx``.
        int8: write ``model-int8.onnx``, in 8-bit integers (static quantisation by ONNX Runtime),
            and ``model.onnx``.
        pt2: ``model.pt2`` is always written; taken for scripts of earlier versions.
        example: inputs: a tensor ``(batch, ...)``, a tuple of inputs or a dictionary of them by
            name. The files are compared on these rows; zeros tell a shape and are replaced by
            standard normal numbers. :func:`~pyro_sparse.export.compact` has noted them.
        calibration: rows of training, from which int8 takes the ranges of activations, some
            hundreds; the example when absent.
        test: inputs and targets ``(x, y)`` on which every format is scored, for the model card:
            accuracy for whole numbers, root mean squared error otherwise.
        dense: the full network that ``small`` was cut out of. Its size stands in the model card,
            its operations, without weights, in ``dense.pt2``, for ``bench``.
        preprocessing: what callers must do to inputs, in JSON's types and tensors; recorded.
        metadata: anything else worth recording, likewise. The model card shows ``model``, ``data``,
            ``net``, ``seed``, ``epochs``, ``kept`` and ``units`` (by group),
            ``max_abs_diff_masked_compact``, ``cautions`` (sentences), and ``scores``: for
            ``dense``, ``trained``, ``ensemble`` and ``compact`` any of ``accuracy``, ``rmse``,
            ``nll`` and ``ece``, of the rows that ``scored_on`` names (the test set).
        overwrite: replace these files where the folder is not empty; those of an earlier export
            that are not written again are removed.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is not empty, without ``overwrite``.
        ModuleNotFoundError: ``onnx`` or ``int8`` without their packages.
        ValueError: no example; the network cannot be exported, or cannot be written in one of the
            formats; a file does not compute what ``small`` does.
    """
    directory = Path(directory)
    onnx = onnx or int8
    check_target(directory, onnx=onnx, overwrite=overwrite)
    inputs = input_of(small, example)
    exported = export_program(small, inputs)
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": _architecture(small),
        "inputs": described(exported.inputs, exported.names),
        "call": _call(exported),
        "outputs": list(exported.outputs),
        "batch": {"only": inputs.batch, "reason": exported.fixed} if exported.fixed else "any",
        "cost": {
            name: _cost(net, inputs, bool(exported.fixed))
            for name, net in (("compact", small), ("dense", dense))
            if net is not None
        },
        "compaction": getattr(small, "compaction", None),
        "draws": getattr(small, "draws", None),
        "preprocessing": preprocessing,
        "metadata": metadata,
        "torch": str(torch.__version__),
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that moving a file is one step of the file system.
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.resolve().parent))
    try:
        _json(config)  # before the work, what cannot be written
        # Not save_file, whose files nobody but their owner may read.
        (draft / "model.safetensors").write_bytes(serialise(_tensors(small)))
        if dense is not None:
            _write_dense(dense, inputs, draft)
        runners = _write_formats(small, exported, inputs, calibration, draft, onnx=onnx, int8=int8)
        config["formats"] = _compared(small, runners, inputs, exported)
        if test is not None:
            config["test"] = scored(small, runners, test, exported)
        config["files"] = {name: _digest(draft / name) for name in FILES if (draft / name).exists()}
        text = _json(config)
        (draft / "config.json").write_text(text, encoding="utf-8")
        (draft / "README.md").write_text(model_card(json.loads(text)), encoding="utf-8")
        directory.mkdir(exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
        for name in (*GONE, *WRITTEN):
            if (draft / name).exists():
                os.replace(draft / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(draft)
    return directory


def check_target(directory: str | Path, *, onnx: bool = False, overwrite: bool = False) -> None:
    """What :func:`save` would refuse whatever the network, before any work.

    Raises:
        FileExistsError: where the folder is not empty, without ``overwrite``.
        ModuleNotFoundError: for ``onnx`` without its packages.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, not a folder")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise FileExistsError(
            f"the folder {directory} is not empty: choose another, or in Python overwrite=True"
        )
    if onnx:
        require_onnx()


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=1, default=_plain, allow_nan=False)


def _digest(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_formats(
    small: nn.Module,
    exported: Exported,
    inputs: Inputs,
    calibration: Example | None,
    folder: Path,
    *,
    onnx: bool,
    int8: bool,
) -> dict[str, Runner]:
    """Write the files that were asked for; what runs each of them."""
    runners: dict[str, Runner] = {}
    names, outputs = exported.names, exported.outputs
    if onnx:  # before .pt2, which is written without the notes that this exporter reads
        write_onnx(exported, folder / "model.onnx")
        runners["onnx"] = onnx_runner(folder / "model.onnx", names, outputs)
    if int8:
        rows = inputs if calibration is None else Inputs.of(small, calibration)
        rows = tensors_only(rows.map(lambda value: value.detach().cpu()))
        only = inputs.batch if exported.fixed else None
        path = folder / "model-int8.onnx"
        write_int8(folder / "model.onnx", path, example_rows(rows, None), names, only)
        runners["int8"] = onnx_runner(path, names, outputs)
    write_program(exported, folder / "model.pt2")
    runners["pt2"] = program_runner(folder / "model.pt2")
    return runners


def _compared(
    small: nn.Module, runners: Mapping[str, Runner], inputs: Inputs, exported: Exported
) -> dict[str, dict[str, float]]:
    """How far each file is from ``small``. Int8 is another network, and only told."""
    batches = None if exported.fixed else BATCHES
    files = {"pt2": "model.pt2", "onnx": "model.onnx", "int8": "model-int8.onnx"}
    return {
        key: largest_difference(small, runner, inputs, files[key], batches, rounded=key == "int8")
        for key, runner in runners.items()
    }


def _write_dense(dense: nn.Module, inputs: Inputs, folder: Path) -> None:
    """The full network's operations, where it can be exported."""
    try:
        exported = export_program(dense, inputs)
    except ValueError:
        return
    write_program(exported, folder / DENSE, hollow=True)


def _cost(net: nn.Module, inputs: Inputs, fixed: bool) -> dict[str, int]:
    """Parameters, and MACs of one input: a share of the only batch where that is fixed."""
    inputs = inputs.map(lambda value: value.to(device_of(net)))
    macs = nets.count_macs(net, inputs, rows=inputs.batch if fixed else 1)
    return {"parameters": nets.count_parameters(net), "macs": macs}


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Copies, since the format refuses tensors that share memory."""
    return {
        name: value.detach().cpu().clone().contiguous() for name, value in net.state_dict().items()
    }


def _architecture(net: nn.Module) -> dict[str, Any]:
    """The network in words: its layers as torch prints them, the shapes of its tensors."""
    layers = {name: repr(part) for name, part in net.named_modules() if not list(part.children())}
    return {
        "class": type(net).__name__,
        "layers": layers,
        "tensors": {name: list(value.shape) for name, value in net.state_dict().items()},
    }


def _call(exported: Exported) -> list[Any]:
    """Positional and keyword arguments, each tensor by its name."""
    names = iter(exported.names)
    named = exported.inputs.map(lambda value: next(names))
    return [list(named.args), named.kwargs]


def _plain(value: object) -> Any:
    """What JSON does not know of: tensors, paths, mappings."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")
