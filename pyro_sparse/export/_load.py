"""Reads the folders that :func:`~pyro_sparse.export.save` writes, as data: nothing in them runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_sparse.inputs import Inputs

from .archive import FormatError
from .program import read_program

__all__ = [
    "DENSE",
    "FILES",
    "FORMAT",
    "FORMAT_VERSION",
    "example_of",
    "load",
    "read_config",
    "reference",
]

FORMAT = "pyro-sparse-network"
FORMAT_VERSION = 2
DENSE = "dense.pt2"
# Those with a digest in config.json. The model card may be edited.
FILES = ("model.safetensors", "model.pt2", "model.onnx", "model-int8.onnx", DENSE)
LONGEST = 64 * 2**20  # bytes of config.json


def read_config(directory: str | Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        FileNotFoundError: where there is none.
        FormatError: where it is of another format or version.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is {directory} an exported network?")
    _refuse_link(path)
    if path.stat().st_size > LONGEST:
        raise FormatError(f"{path} is larger than any description of a network")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FormatError(f"{path} does not describe an exported network ({FORMAT})")
    version = config.get("format_version")
    if version == 1:
        raise FormatError(
            f"{directory} was written by an earlier version, as operations in config.json that are "
            "no longer read: export the run again"
        )
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version}, this version reads {FORMAT_VERSION}: install a "
            "later pyro-sparse, or open model.pt2 by torch.export.load"
        )
    return config


def load(directory: str | Path) -> nn.Module:
    """The exported network, in eval mode and on the CPU.

    Every file is compared with its digest, and ``model.pt2`` is read as data before torch sees it:
    a damaged folder is found out, and nothing that a folder brings along is run. A digest tells
    damage, not who wrote the folder.

    Args:
        directory: the exported folder.

    Raises:
        FileNotFoundError: where a file is missing.
        FormatError: where the folder is of another version, a file is not the one that was written,
            or holds anything but operations and tensors.
    """
    config = read_config(directory)
    contents = {name: _content(directory, config, name) for name in _listed(directory, config)}
    return _evaluating(read_program(contents["model.pt2"]))


def reference(directory: str | Path) -> nn.Module:
    """The full-size network that the exported one was cut out of, with *random* weights.

    It is there to measure what the removal saves, nothing else: its weights were not exported.

    Args:
        directory: the exported folder.

    Raises:
        FormatError: where the folder does not hold it.
    """
    config = read_config(directory)
    if DENSE not in _listed(directory, config):
        raise FormatError(f"{directory} does not say which full-size network it was cut out of")
    net = read_program(_content(directory, config, DENSE), hollow=True)
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            if value.is_floating_point():  # not negative, as variances are
                value.copy_(0.1 * torch.rand(value.shape))
    return _evaluating(net)


def example_of(directory: str | Path) -> Inputs:
    """Inputs of the exported network, at its only batch size or two of them: zeros.

    Args:
        directory: the exported folder.
    """
    config = read_config(directory)
    batch = 2 if config["batch"] == "any" else config["batch"]["only"]
    tensors = {
        one["name"]: torch.zeros(
            [batch, *one["shape"]] if one["batch"] else one["shape"],
            dtype=getattr(torch, one["dtype"]),
        )
        for one in config["inputs"]
    }

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return tensors[value]
        if isinstance(value, list):
            return tuple(filled(part) for part in value)
        if isinstance(value, dict):
            return {name: filled(part) for name, part in value.items()}
        return value

    args, kwargs = config["call"]
    return Inputs(filled(args), filled(kwargs))


def _listed(directory: str | Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The files that the folder has to hold, with their digests."""
    files = config.get("files")
    if not isinstance(files, dict) or "model.pt2" not in files:
        raise FormatError(f"{directory}/config.json does not list the folder's files")
    for name, said in files.items():
        if name not in FILES:
            raise FormatError(f"{directory}/config.json lists {name!r}, which is none of its files")
        if not isinstance(said, dict) or not {"bytes", "sha256"} <= said.keys():
            raise FormatError(f"{directory}/config.json does not have the digest of {name}")
    return files


def _content(directory: str | Path, config: Mapping[str, Any], name: str) -> bytes:
    """What a file holds, if that is what was written."""
    path, said = Path(directory) / name, config["files"][name]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    _refuse_link(path)
    if path.stat().st_size != said["bytes"]:
        raise FormatError(
            f"{path} is damaged: it has {path.stat().st_size} bytes, {said['bytes']} were written"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != said["sha256"]:
        raise FormatError(f"{path} is damaged: it does not have the digest in config.json")
    return content


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise FormatError(f"{path} is a link to another file, which is not read")


def _evaluating(net: nn.Module) -> nn.Module:
    """``net.eval()`` does nothing, as it should, where torch's own raises."""

    def train(mode: bool = True) -> nn.Module:
        if mode:
            raise ValueError(
                "an exported network computes as in eval mode: train the one that was saved"
            )
        return net

    for module in net.modules():
        module.training = False
    net.train, net.eval = train, lambda: net  # type: ignore[method-assign]
    return net
