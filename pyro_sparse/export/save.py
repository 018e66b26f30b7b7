"""Writes a network as a folder that loads without this package: see :mod:`.load`."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, fx, nn

from pyro_sparse.graph import trace

from .load import FORMAT, FORMAT_VERSION, FUNCTIONS, METHODS, MODULES, load

__all__ = ["save"]

LOADER = Path(__file__).with_name("load.py")
FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}


def save(
    small: nn.Module,
    directory: str | Path,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and ``load.py`` into a folder.

    The folder loads with torch and safetensors alone: ``from load import load``. What is written is
    read back before it takes its place; a failure leaves an existing folder as it was.

    :param small: the network, usually from :func:`~pyro_sparse.export.compact_network`. It is saved
        as it computes in eval mode.
    :param directory: made if missing.
    :param preprocessing: what callers must do to inputs, in JSON's types and tensors; recorded.
    :param metadata: anything else worth recording (data, seed, accuracy), likewise.
    :param overwrite: replace these three files where the folder is not empty.
    :returns: the folder.
    :raises FileExistsError: where the folder is not empty, without ``overwrite``.
    :raises ValueError: where the network cannot be traced, or uses a layer or function that the
        loader does not know.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, not a folder")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise FileExistsError(
            f"the folder {directory} is not empty: choose another, or in Python overwrite=True"
        )
    traced = trace(small)
    architecture, tensors = _describe(traced)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "compaction": getattr(small, "compaction", None),
        "preprocessing": preprocessing,
        "metadata": metadata,
        "torch": str(torch.__version__),
    }
    text = json.dumps(config, indent=1, default=_plain, allow_nan=False)
    directory.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that moving a file is one step of the file system.
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.resolve().parent))
    try:
        # Not save_file, whose files nobody but their owner may read.
        (draft / "model.safetensors").write_bytes(serialise(tensors))
        shutil.copyfile(LOADER, draft / "load.py")
        (draft / "config.json").write_text(text, encoding="utf-8")
        load(draft)
        # A folder without config.json says that it is incomplete: it goes first and comes last.
        (directory / "config.json").unlink(missing_ok=True)
        for name in ("model.safetensors", "load.py", "config.json"):
            os.replace(draft / name, directory / name)
    finally:
        shutil.rmtree(draft)
    return directory


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
