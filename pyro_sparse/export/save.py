"""Writes a network as a folder that loads without this package: see :mod:`.load`."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, fx, nn

from pyro_sparse import nets
from torch.fx import symbolic_trace as trace

from .card import model_card
from .check import described, input_of, largest_difference
from .load import FORMAT, FORMAT_VERSION, FUNCTIONS, METHODS, MODULES, load
from .onnx import onnx_runner, require_onnx, write_onnx
from .program import program_runner, write_program

__all__ = ["check_target", "save"]

LOADER = Path(__file__).with_name("load.py")
FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
# In the order in which they take their place. A folder without config.json says that it is
# incomplete: it goes first and comes last.
FILES = ("model.safetensors", "load.py", "model.onnx", "model.pt2", "README.md", "config.json")
# What `bench` adds: true of the files that it measured only.
MEASURED = ("bench.json", "bench.png")


def save(
    small: nn.Module,
    directory: str | Path,
    *,
    onnx: bool = False,
    pt2: bool = False,
    example: Tensor | None = None,
    dense: nn.Module | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a network as a folder that loads without this package.

    ``config.json``, ``model.safetensors`` and ``load.py``, which loads them with torch and
    safetensors alone; ``README.md``, a model card; ``model.onnx`` and ``model.pt2`` on request. The
    files are made aside, read back and compared with ``small`` at several batch sizes before they
    take their place; a failure leaves an existing folder as it was. No pickle is written.

    :param small: the network, usually from :func:`~pyro_sparse.export.compact`. It is saved as it
        computes in eval mode.
    :param directory: made if missing.
    :param onnx: write ``model.onnx``, with a free batch size; needs the extra ``onnx``.
    :param pt2: write ``model.pt2``, a ``torch.export`` program with a free batch size.
    :param example: inputs ``(batch, ...)``: several, to be compared on these, or one for its shape.
        :func:`~pyro_sparse.export.compact` has noted that, other networks need one for ``onnx`` and
        ``pt2``, and for MACs in the model card.
    :param dense: the full network that ``small`` was cut out of. Its size stands in the model card,
        its architecture (without weights) in ``config.json``, for ``bench``.
    :param preprocessing: what callers must do to inputs, in JSON's types and tensors; recorded.
    :param metadata: anything else worth recording, likewise. The model card shows ``model``,
        ``data``, ``net``, ``seed``, ``epochs``, ``kept`` and ``units`` (by group),
        ``max_abs_diff_masked_compact``, and ``scores``: for ``dense``, ``ensemble`` and ``compact``
        any of ``accuracy``, ``rmse``, ``nll`` and ``ece``.
    :param overwrite: replace these files where the folder is not empty; those of an earlier export
        that are not written again are removed.
    :returns: the folder.
    :raises FileExistsError: where the folder is not empty, without ``overwrite``.
    :raises ModuleNotFoundError: for ``onnx`` without its packages.
    :raises ValueError: where the network cannot be traced, uses a layer or function that the loader
        does not know, or cannot be written in one of the formats.
    """
    directory = Path(directory)
    check_target(directory, onnx=onnx, overwrite=overwrite)
    example = input_of(small, example)
    if (onnx or pt2) and example is None:
        raise ValueError(
            "ONNX and .pt2 files need an example input: pass example=, a tensor (batch, ...)"
        )
    architecture, tensors = _describe(trace(small))
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "input": None if example is None else described(example),
        "dense": None if dense is None else _skeleton(dense),
        "cost": {},
        "compaction": getattr(small, "compaction", None),
        "draws": getattr(small, "draws", None),
        "preprocessing": preprocessing,
        "metadata": metadata,
        "torch": str(torch.__version__),
        "formats": {},
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that moving a file is one step of the file system.
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.resolve().parent))
    try:
        # Not save_file, whose files nobody but their owner may read.
        (draft / "model.safetensors").write_bytes(serialise(tensors))
        shutil.copyfile(LOADER, draft / "load.py")
        _write_config(draft, config)
        config["formats"] = _write_formats(small, load(draft), example, draft, onnx=onnx, pt2=pt2)
        config["cost"] = {
            name: _cost(net, example)
            for name, net in (("compact", small), ("dense", dense))
            if net is not None
        }
        _write_config(draft, config)
        written = json.loads((draft / "config.json").read_text(encoding="utf-8"))
        (draft / "README.md").write_text(model_card(written), encoding="utf-8")
        directory.mkdir(exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
        for name in (*MEASURED, *FILES):
            if (draft / name).exists():
                os.replace(draft / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(draft)
    return directory


def check_target(directory: str | Path, *, onnx: bool = False, overwrite: bool = False) -> None:
    """What :func:`save` would refuse whatever the network, before any work.

    :raises FileExistsError: where the folder is not empty, without ``overwrite``.
    :raises ModuleNotFoundError: for ``onnx`` without its packages.
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


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=1, default=_plain, allow_nan=False)
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write_formats(
    small: nn.Module,
    loaded: nn.Module,
    example: Tensor | None,
    folder: Path,
    *,
    onnx: bool,
    pt2: bool,
) -> dict[str, dict[str, float]]:
    """Write the files that were asked for; how far each is from ``small``.

    They are made from ``loaded``, which is on the CPU.
    """
    if example is None:
        return {}
    runners: dict[str, Callable[[Tensor], Tensor]] = {"safetensors": loaded}
    if onnx:
        write_onnx(loaded, example, folder / "model.onnx")
        runners["onnx"] = onnx_runner(folder / "model.onnx")
    if pt2:
        write_program(loaded, example, folder / "model.pt2")
        runners["pt2"] = program_runner(folder / "model.pt2")
    names = {"safetensors": "model.safetensors", "onnx": "model.onnx", "pt2": "model.pt2"}
    return {
        key: largest_difference(small, runner, example, names[key])
        for key, runner in runners.items()
    }


def _cost(net: nn.Module, example: Tensor | None) -> dict[str, int | None]:
    return {
        "parameters": nets.count_parameters(net),
        "macs": None if example is None else nets.count_macs(net, example.to(_device(net))),
    }


def _device(net: nn.Module) -> torch.device:
    """Where a network lies; the CPU where it has no tensors."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _skeleton(net: nn.Module) -> dict[str, Any]:
    """A network's architecture, with the shapes of the tensors that are not a layer's."""
    architecture, tensors = _describe(trace(net))
    shapes = {name: list(tensors[name].shape) for name in architecture["tensors"]}
    floating = next(value.dtype for value in net.parameters() if value.is_floating_point())
    return {**architecture, "shapes": shapes, "dtype": str(floating).removeprefix("torch.")}


def _plain(value: object) -> Any:
    """What JSON does not know of: tensors, paths, mappings."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def _describe(traced: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The architecture in JSON's types, and the tensors by name."""
    nodes: list[dict[str, Any]] = []
    modules: dict[str, dict[str, Any]] = {}
    kinds: dict[str, str] = {}
    tensors = dict(traced.state_dict())
    for node in traced.graph.nodes:
        target = node.target
        if node.op == "call_function":
            if target not in FUNCTION_NAMES:
                raise ValueError(f"cannot export: the loader does not know the function {target!r}")
            target = FUNCTION_NAMES[target]
        elif node.op == "call_method" and target not in METHODS:
            raise ValueError(f"cannot export: the loader does not know the method {target!r}")
        elif node.op == "call_module":
            modules[target] = _module(target, traced.get_submodule(target))
        elif node.op == "get_attr":
            value = functools.reduce(getattr, target.split("."), traced)
            if not isinstance(value, Tensor):
                raise ValueError(f"cannot export: {target!r} is a {type(value).__name__}")
            kinds[target] = "parameter" if isinstance(value, nn.Parameter) else "buffer"
            tensors[target] = value
        args = [_encode(value) for value in node.args]
        kwargs = {key: _encode(value) for key, value in node.kwargs.items()}
        nodes.append(
            {"name": node.name, "op": node.op, "target": target, "args": args, "kwargs": kwargs}
        )
    # Copies, since the format refuses tensors that share memory.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    return {"nodes": nodes, "modules": modules, "tensors": kinds}, tensors


def _module(name: str, module: nn.Module) -> dict[str, Any]:
    """A layer as its class and constructor arguments, which torch's layers keep as attributes."""
    kind = type(module)
    if kind.__name__ not in MODULES or getattr(nn, kind.__name__, None) is not kind:
        raise ValueError(f"cannot export {name!r}: the loader does not know {kind.__name__}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"cannot export {name!r}: it has hooks, which cannot be saved")
    arguments = {}
    for key, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if key in ("device", "dtype") or key.startswith("_"):
            continue
        if key == "bias":  # a flag in the constructor, a parameter afterwards
            arguments[key] = module.bias is not None
        elif hasattr(module, key):
            arguments[key] = _encode(getattr(module, key))
        elif parameter.default is parameter.empty:
            raise ValueError(f"cannot export {name!r}: {kind.__name__} does not keep its {key!r}")
    return {"class": kind.__name__, "arguments": arguments}


def _encode(value: Any) -> Any:
    """An argument in JSON's types: the inverse of the loader's ``_decode``."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is ...:
        return {"ellipsis": None}
    raise ValueError(f"cannot export an argument of type {type(value).__name__}: {value!r}")
