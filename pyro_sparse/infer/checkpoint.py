"""Checkpoints: one safetensors file holds everything that training needs to go on, no pickle.

Tensors are named ``guide.…``, ``model.…``, ``optimizer.…``, ``loader.…`` and ``random.…``; the
rest (the epochs' metrics, class names, the optimiser's numbers) is JSON in the file's header. The
file is written aside and renamed: a reader finds the old one or the new one, never half of either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["checkpoint_file", "load_checkpoint", "restore", "save_checkpoint"]

FORMAT = 1


def checkpoint_file(folder: Path) -> Path:
    """Where a run folder keeps its last checkpoint."""
    return folder / "checkpoint" / "last.safetensors"


def save_checkpoint(
    path: Path,
    model: nn.Module,
    guide: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loader: Any = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write model, guide and, where given, the state of training.

    Args:
        path: the file; its folder is made.
        model: its buffers are kept.
        guide: its parameters are kept.
        optimizer: its state, if training may go on.
        loader: its order, where it has a ``state_dict`` of tensors.
        progress: anything JSON can hold, such as the epoch.
    """
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors |= {f"guide.{name}": value for name, value in guide.state_dict().items()}
    tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
    header: dict[str, Any] = {
        "format": FORMAT,
        "model": type(model).__name__,
        "guide": type(guide).__name__,
        "progress": dict(progress or {}),
    }
    if optimizer is not None:
        state = optimizer.state_dict()
        header["optimizer"] = state["param_groups"]
        for index, entries in state["state"].items():
            tensors |= {
                f"optimizer.{index}.{name}": value
                for name, value in entries.items()
                if isinstance(value, Tensor)
            }
    if hasattr(loader, "state_dict"):
        tensors |= {f"loader.{name}": value for name, value in loader.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    # Clones: safetensors refuses tensors that share memory, as expanded buffers may.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, aside, metadata={"pyro_sparse": json.dumps(header)})
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no checkpoint of this format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none; was the run fitted?")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("pyro_sparse", "{}"))
            # Copies: mapped memory need not be aligned, which may change the last bit of sums.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {header.get('format')}, expected {FORMAT}; load it with "
            "the version of pyro-sparse that wrote it"
        )
    return header, tensors


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def restore(
    path: Path,
    model: nn.Module,
    guide: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loader: Any = None,
) -> dict[str, Any]:
    """Load a checkpoint into modules of the same kind; returns its ``progress``.

    The random state is set as well where ``optimizer`` is given, that is, to go on training.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`, or the checkpoint is of another model,
            guide or network.
    """
    header, tensors = load_checkpoint(path)
    for role, module in (("model", model), ("guide", guide)):
        if header[role] != type(module).__name__:
            raise ValueError(
                f"{path} holds a {role} of class {header[role]}, expected "
                f"{type(module).__name__}; build the {role} that was fitted"
            )
        saved, own = _part(tensors, f"{role}."), module.state_dict()
        differ = sorted(
            name
            for name in saved.keys() | own.keys()
            if name not in saved or name not in own or saved[name].shape != own[name].shape
        )
        if differ:
            raise ValueError(
                f"{path} does not fit this {role}: {', '.join(differ[:3])} differ in name or shape "
                "(another network or other options?); build it as it was fitted"
            )
        module.load_state_dict(saved)
    if optimizer is not None:
        if "optimizer" not in header:
            raise ValueError(f"{path} has no state of training, it cannot be resumed")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, "optimizer.").items():
            index, entry = name.split(".", 1)
            state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({"state": state, "param_groups": header["optimizer"]})
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    if hasattr(loader, "load_state_dict"):
        order = _part(tensors, "loader.")
        if order:
            loader.load_state_dict(order)
    return header["progress"]
