"""Checkpoints: one safetensors file holds everything that training needs to go on, no pickle.

Tensors are named ``guide.…``, ``model.…``, ``optimizer.…``, ``loader.…``, ``random.…`` and, in the
midst of an epoch, ``order.…``; the rest (the epochs' metrics, class names, the optimiser's numbers)
is JSON in the file's header, beside a checksum of all. The file is written aside and renamed: a
reader finds the old one or the new one, never half of either.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .identity import differences

__all__ = [
    "State",
    "capture",
    "checkpoint_file",
    "install",
    "load_checkpoint",
    "order_of",
    "restore",
    "save_checkpoint",
    "set_order",
    "write_checkpoint",
]

FORMAT = 2
OWN = "the state"
"""What errors call a state that this process captured itself."""


class State(NamedTuple):
    """A checkpoint in memory.

    header:  what JSON can hold
    tensors: on the CPU, sharing memory with nothing
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def order(self) -> dict[str, Tensor]:
        """`order_of` the loader when the running epoch began, in a state from its midst."""
        return _part(self.tensors, "order.")


def checkpoint_file(folder: Path, which: str = "last") -> Path:
    """Where a run folder keeps its ``last`` or ``best`` checkpoint."""
    return folder / "checkpoint" / f"{which}.safetensors"


def order_of(loader: Any) -> dict[str, Tensor]:
    """What decides noise and batches from here on: random states, and the loader's own.

    A loader takes part if its ``state_dict`` holds nothing but tensors.
    """
    order = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        order["random.cuda"] = torch.cuda.get_rng_state()
    if hasattr(loader, "state_dict"):
        own = loader.state_dict()
        if all(isinstance(value, Tensor) for value in own.values()):
            order |= {f"loader.{name}": value for name, value in own.items()}
    return order


def set_order(order: Mapping[str, Tensor], loader: Any) -> None:
    """Set random states and loader to what `order_of` gave; other entries are ignored."""
    torch.set_rng_state(order["random.cpu"])
    if "random.cuda" in order and torch.cuda.is_available():
        torch.cuda.set_rng_state(order["random.cuda"])
    _set_loader(order, loader)


def _set_loader(order: Mapping[str, Tensor], loader: Any) -> None:
    own = _part(order, "loader.")
    if own and hasattr(loader, "load_state_dict"):
        loader.load_state_dict(own)


def capture(
    model: nn.Module,
    guide: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loader: Any = None,
    order: Mapping[str, Tensor] | None = None,
    progress: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> State:
    """A copy of model, guide and, where given, the state of training.

    Args:
        model: its buffers are kept.
        guide: its parameters are kept.
        optimizer: its state, if training may go on.
        loader: its order, where it has a ``state_dict`` of tensors.
        order: `order_of` the loader when the running epoch began.
        progress: anything JSON can hold, such as the epoch.
        identity: what the run is a run of, see :func:`~pyro_sparse.infer.identity.identity`.
    """
    tensors = order_of(loader)
    tensors |= {f"guide.{name}": value for name, value in guide.state_dict().items()}
    tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"order.{name}": value for name, value in (order or {}).items()}
    header: dict[str, Any] = {
        "format": FORMAT,
        "model": type(model).__name__,
        "guide": type(guide).__name__,
        "progress": dict(progress or {}),
        "identity": dict(identity or {}),
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
    # Clones: safetensors refuses tensors that share memory, as expanded buffers may.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return State(copy.deepcopy(header), plain)


def write_checkpoint(path: Path, state: State) -> None:
    """Write a checkpoint in one step; its folder is made.

    Raises:
        OSError: it cannot be written; what was there before is untouched, and nothing is left
            beside it.
    """
    aside = path.with_name(path.name + ".tmp")
    header = json.dumps(state.header)
    metadata = {"pyro_sparse": header, "checksum": _checksum(header, state.tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state.tensors, aside, metadata=metadata)
        _flush(aside)
        os.replace(aside, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        _remove(aside)
        message = (
            f"cannot write {path}: {error}. Checkpoints written before are untouched; make room "
            "(or the folder writable), then go on with resume"
        )
        raise OSError(message) from error
    except BaseException:
        _remove(aside)
        raise


def _remove(path: Path) -> None:
    # What kept the file from being written may keep it from being removed.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, from the cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Contiguous, but where a dimension is 1 its stride may be anything, which view minds.
        flat = value.contiguous().as_strided((value.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(path: Path, model: nn.Module, guide: nn.Module, **state: Any) -> None:
    """Write model, guide and, where given, the state of training.

    Args:
        path: the file; its folder is made.
        model, guide, **state: see `capture`.

    Raises:
        OSError: see `write_checkpoint`.
    """
    write_checkpoint(path, capture(model, guide, **state))


def load_checkpoint(path: Path) -> State:
    """Header and tensors of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no checkpoint of this format, or not as it was written.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a checkpoint at {path}, found none; was the run fitted?{_others(path)}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("pyro_sparse", "{}")
            header = json.loads(text)
            # Copies: mapped memory need not be aligned, which may change the last bit of sums.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}{_others(path)}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged or no checkpoint: its header is no object")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {header.get('format')}, expected {FORMAT}; load it with "
            "the version of pyro-sparse that wrote it"
        )
    if metadata.get("checksum") != _checksum(text, tensors):
        raise ValueError(
            f"{path} is damaged: its content does not have the checksum that was written with it"
            f"{_others(path)}"
        )
    return State(header, tensors)


def _others(path: Path) -> str:
    """Says which other checkpoints lie beside one that cannot be used."""
    others = [
        other.name
        for other in (path.with_name("last.safetensors"), path.with_name("best.safetensors"))
        if other != path and other.is_file()
    ]
    if not others:
        return ""
    return (
        f". There is {others[0]} beside it, which may be used instead: load it, or copy it to "
        f"{path.name} to go on from there"
    )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def install(
    state: State,
    model: nn.Module,
    guide: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loader: Any = None,
    identity: Mapping[str, Any] | None = None,
    origin: str | Path = OWN,
) -> dict[str, Any]:
    """Bring model, guide and, where given, training to a state; returns its ``progress``.

    The random state is set as well where ``optimizer`` is given, that is, to go on training.

    Args:
        state: by `capture` or `load_checkpoint`.
        model, guide: of the same kind.
        optimizer: with the same parameters.
        loader: with the same data.
        identity: what the run is a run of; where the state knows other answers, it is refused.
        origin: what errors call it.

    Raises:
        ValueError: the state is of another model, guide or network, or holds none of training.
    """
    header, tensors = state
    modules = {"model": model, "guide": guide}
    entries: dict[int, dict[str, Tensor]] = {}
    for role, module in modules.items():
        if header[role] != type(module).__name__:
            raise ValueError(
                f"{origin} holds a {role} of class {header[role]}, expected "
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
                f"{origin} does not fit this {role}: {', '.join(differ[:3])} differ in name or "
                "shape (another network or other options?); build it as it was fitted"
            )
    if optimizer is not None and "optimizer" not in header:
        raise ValueError(f"{origin} has no state of training, it cannot be resumed")
    differ = differences(header["identity"], identity or {})
    if differ:
        raise ValueError(
            f"{origin} is of another run: {'; '.join(differ)}. A run goes on as it was begun (its "
            "schedules depend on the epochs, too): repeat its call, or begin another folder"
        )
    if optimizer is not None:
        for name, value in _part(tensors, "optimizer.").items():
            index, entry = name.split(".", 1)
            # The optimiser changes its state in place, and this one may be needed again.
            entries.setdefault(int(index), {})[entry] = value.clone()
        if origin != OWN:  # what this process captured fits
            _check_optimizer(header["optimizer"], entries, optimizer, origin)
        now = order_of(loader)
        order = {name: tensors[name] for name in now if name in tensors}
        differ = sorted(
            name
            for name, value in order.items()
            if value.shape != now[name].shape or value.dtype != now[name].dtype
        )
        if differ or "random.cpu" not in order:
            raise ValueError(
                f"{origin} does not fit this loader or machine: "
                f"{', '.join(differ or ['random.cpu'])} missing, or of another shape or type"
            )
    for role, module in modules.items():
        module.load_state_dict(_part(tensors, f"{role}."))
    if optimizer is not None:
        groups = copy.deepcopy(header["optimizer"])
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
        set_order(tensors, None)
    _set_loader(tensors, loader)
    return copy.deepcopy(header["progress"])


def _check_optimizer(
    groups: Any,
    entries: Mapping[int, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    origin: str | Path,
) -> None:
    """Raise ``ValueError`` unless a saved state is one of this optimiser.

    torch compares how many parameters there are, and fused updates trust the rest: they write
    beyond a tensor that is too small.
    """
    own = optimizer.param_groups
    parameters = [parameter for group in own for parameter in group["params"]]
    same = (
        isinstance(groups, list)
        and len(groups) == len(own)
        and all(
            isinstance(group, dict)
            and group.keys() == mine.keys()
            and isinstance(group["params"], list)
            and len(group["params"]) == len(mine["params"])
            for group, mine in zip(groups, own, strict=True)
        )
        and [index for group in groups for index in group["params"]] == [*range(len(parameters))]
    )
    problem = "" if same else "it has other groups of parameters, or other options"
    expected = {} if problem else _first_state(optimizer)
    for index, values in entries.items():
        for name, value in values.items():
            like = expected.get(index, {}).get(name)
            if like is None or (value.shape, value.dtype) != (like.shape, like.dtype):
                wanted = "none" if like is None else f"{like.dtype} of shape {tuple(like.shape)}"
                problem = problem or (
                    f"{name} of parameter {index} is {value.dtype} of shape {tuple(value.shape)}, "
                    f"expected {wanted}"
                )
    if problem:
        raise ValueError(
            f"{origin} does not fit this optimiser ({type(optimizer).__name__}): {problem}; train "
            "with the optimiser that the run was begun with"
        )


def _first_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """What the optimiser keeps of every parameter, by the first step of a copy."""
    probe = copy.deepcopy(optimizer)
    probe.state.clear()
    for group in probe.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    probe.step()
    return probe.state_dict()["state"]


def restore(
    path: Path,
    model: nn.Module,
    guide: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loader: Any = None,
) -> dict[str, Any]:
    """`install` what lies in a file; returns its ``progress``.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint` and `install`.
    """
    state = load_checkpoint(path)
    return install(state, model, guide, optimizer=optimizer, loader=loader, origin=path)
