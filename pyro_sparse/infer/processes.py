"""Devices, and training in several processes: what all of them do alike, and what only one does.

Each process has a copy of model and guide, sees its share of every batch, and draws noise of its
own. Its loss estimates the negative evidence lower bound of *all* data, so the mean of the
gradients, which DDP forms, is an unbiased gradient of that bound, with nothing left to divide by.
Everything is decided alike: numbers that a decision depends on are averaged over the processes
first, and files are read and written by the first one only.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_sparse.data import Batches
from pyro_sparse.names import PRECISIONS

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["launch", "make_fabric", "on_first", "share", "unify"]

Result = TypeVar("Result")


def make_fabric(
    *,
    devices: int = 1,
    accelerator: str = "auto",
    strategy: str = "auto",
    num_nodes: int = 1,
    precision: str = "32-true",
) -> Fabric:
    """A ``lightning_fabric.Fabric`` for `fit`.

    Args:
        devices: how many of each machine.
        accelerator: ``"cpu"``, ``"gpu"`` or ``"auto"``.
        strategy: ``"ddp"`` (which ``"auto"`` is, for several devices), or another one of Fabric.
        num_nodes: machines; the command is started on each, by ``torchrun`` or the like.
        precision: one of `pyro_sparse.names.PRECISIONS`.

    Raises:
        ValueError: there are not so many devices, or an option is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"expected a precision of {', '.join(PRECISIONS)}, got {precision!r}")
    if devices < 1 or num_nodes < 1:
        raise ValueError(
            f"expected at least one device and one machine, got {devices} and {num_nodes}"
        )
    with _quiet():
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

        chosen: Any = strategy
        if strategy == "ddp" or (strategy == "auto" and devices * num_nodes > 1):
            # The network's initial weights are buffers, too: not to be sent in every step.
            options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            new, old = "forward_sync_buffers", "broadcast_buffers"
            quiet: dict[str, Any] = {new if new in options else old: False}
            chosen = DDPStrategy(**quiet)
        try:
            fabric = Fabric(
                devices=devices,
                accelerator=accelerator,
                strategy=chosen,
                num_nodes=num_nodes,
                precision=precision,  # type: ignore[arg-type]
            )
        except Exception as error:  # of Fabric's own kinds
            raise ValueError(
                f"devices={devices}, accelerator={accelerator!r}, strategy={strategy!r} cannot be "
                f"had: {error}"
            ) from error
    # Fabric would round the batch itself, targets included; autocast rounds what it multiplies.
    fabric.strategy.precision.convert_input = lambda data: data  # type: ignore[method-assign]
    if precision == "16-mixed" and fabric.device.type == "cpu":
        raise ValueError("precision '16-mixed' needs an accelerator; on the CPU use 'bf16-mixed'")
    return fabric


def launch(fabric: Fabric) -> None:
    """Start the other processes, unless they run; each begins the program anew, up to here."""
    if fabric.world_size > 1 and not torch.distributed.is_initialized():
        with _quiet():
            fabric.launch()
        # A group whose threads still run when Python ends may abort the process, its work done.
        atexit.register(_leave_group)
        fabric.barrier()


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Fabric does not announce what it was told to do, in each process anew."""
    logger = logging.getLogger("lightning_fabric")
    with warnings.catch_warnings():
        # Its hints are about clusters.
        warnings.simplefilter("ignore")
        with _unloaded("torchmetrics"):
            import lightning_fabric  # noqa: F401  (sets the level itself)

        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _unloaded(package: str) -> Iterator[None]:
    """Who imports ``package`` for its version finds that, and nothing else of it is loaded.

    Fabric does, of torchmetrics, which would load torchvision, transformers and more: seconds.
    """
    stand_in: Any = ModuleType(package)
    try:
        stand_in.__version__ = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        stand_in = None
    if stand_in is None or package in sys.modules:
        yield
        return
    sys.modules[package] = stand_in
    try:
        yield
    finally:
        del sys.modules[package]


def share(
    loader: Iterable[tuple[Tensor, Tensor]], fabric: Fabric
) -> Iterable[tuple[Tensor, Tensor]]:
    """What this process sees of a loader.

    Its share of every batch of :class:`~pyro_sparse.data.Batches`. A ``DataLoader`` is given a
    ``DistributedSampler``: its batch size is that of each process.

    Raises:
        ValueError: the loader cannot be shared.
    """
    if fabric.world_size == 1:
        return loader
    if isinstance(loader, Batches):
        return loader.shard(fabric.global_rank, fabric.world_size)
    if isinstance(loader, torch.utils.data.DataLoader):
        shared: Any = fabric.setup_dataloaders(loader, move_to_device=False)
        return shared
    raise ValueError(
        "expected pyro_sparse.data.Batches or a torch DataLoader to share among "
        f"{fabric.world_size} processes, got {type(loader).__name__}"
    )


def on_first(fabric: Fabric, function: Callable[[], Result]) -> Result:
    """Call ``function`` in the first process only; all return what it returns, or raise its error.

    Raises:
        Exception: what ``function`` raises.
    """
    if fabric.world_size == 1:
        return function()
    result: Any = None
    error: Exception | None = None
    if fabric.is_global_zero:
        try:
            result = function()
        except Exception as raised:  # the others wait to hear of it
            error = raised
    result, error = fabric.broadcast((result, error))
    if error is not None:
        raise error
    return result


@torch.no_grad()
def unify(fabric: Fabric, *modules: nn.Module) -> None:
    """Give all processes the parameters and buffers of the first."""
    if fabric.world_size == 1:
        return
    for module in modules:
        state = module.state_dict()
        for name, value in state.items():
            # Expanded tensors, and those of truth values, cannot be sent as they are.
            sent = value.to(torch.uint8) if value.dtype == torch.bool else value.contiguous()
            torch.distributed.broadcast(sent, src=0)
            state[name] = sent.to(value.dtype)
        module.load_state_dict(state)


def random_states(fabric: Fabric) -> dict[str, Tensor]:
    """The random states of all processes, ``(processes, bytes)`` each; none for a single one."""
    if fabric.world_size == 1:
        return {}
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    gathered = {}
    for name, state in states.items():
        own = state.to(fabric.device)
        parts = [torch.empty_like(own) for _ in range(fabric.world_size)]
        torch.distributed.all_gather(parts, own)
        gathered[f"ranks.{name}"] = torch.stack(parts).cpu()
    return gathered


def set_random_states(fabric: Fabric, states: dict[str, Tensor]) -> None:
    """Go on with the noise that `random_states` gave, or with new noise for other processes.

    With new noise the random states must be the same in all processes when this is called.
    """
    if fabric.world_size == 1:
        return
    rank = fabric.global_rank
    own = states.get("ranks.cpu")
    if own is None or len(own) != fabric.world_size:
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
        return
    torch.set_rng_state(own[rank].clone())  # torch crashes on a view
    if "ranks.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["ranks.cuda"][rank].clone())
