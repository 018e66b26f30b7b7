"""How much memory training will need, before it starts, and how much there is."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_sparse import nets
from pyro_sparse.modules import own_parameters

from .elbo import ELBO

__all__ = ["MemoryNeed", "available_memory", "check_memory", "kept_bytes", "memory_need"]

OPTIMIZER_NUMBERS = 2
"""Numbers that an optimiser keeps a parameter: Adam's; momentum has one."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of training, beside the data.

    Attributes:
        parameters: of the guide, and the model's buffers.
        optimizer: its state.
        fixed: of one step at its peak, whatever the batch: gradients, draws, terms of the KL.
        per_example: what each example adds to that: itself, activations and their gradients.
        batch_size: examples a batch.
    """

    parameters: int
    optimizer: int
    fixed: int
    per_example: int
    batch_size: int

    @property
    def step(self) -> int:
        """Of one step at its peak."""
        return self.fixed + self.batch_size * self.per_example

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.step


class _Followed(TorchDispatchMode):
    """Bytes of the tensors made inside that are there, whenever one more is."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.moments: list[int] = []
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        self.now += storage.nbytes()
        self.moments.append(self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def _kept_tensors(model: Any, guide: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What is there from step to step, and the part of it that is trained."""
    own = [*guide.parameters(), *guide.buffers(), *model.buffers()]
    return own, [value for value in guide.parameters() if value.requires_grad]


def kept_bytes(model: Any, guide: Any) -> tuple[int, int]:
    """Bytes of model and guide, and of the optimiser's state: what a checkpoint holds, too."""
    own, trained = (sum(value.nbytes for value in part) for part in _kept_tensors(model, guide))
    return own, OPTIMIZER_NUMBERS * trained


def memory_need(
    elbo: ELBO, model: Any, guide: Any, x: Tensor, y: Tensor, batch_size: int
) -> MemoryNeed:
    """Estimate what training needs, from one gradient of 2 and one of 4 examples.

    All tensors that torch makes on the way are followed from their making to their end. At each of
    these moments the bytes are a line in the number of examples, and the highest line counts. What
    a kernel allocates and frees within itself is left out, and so is what the allocator holds back:
    docs/training.md has estimates beside measured peaks.

    Args:
        elbo, model, guide: see `fit`. Random states, running statistics and gradients are left as
            they were.
        x, y: examples, four if there are.
        batch_size: examples a batch.
    """
    own, trained = _kept_tensors(model, guide)

    def moments(examples: int) -> list[int]:
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            nets.kept_statistics(model.net),
            own_parameters(model, guide),
            _Followed() as followed,
        ):
            for value in own:
                followed.seen.add(value.untyped_storage())
            loss = elbo.estimate(model, guide, x[:examples], y[:examples]).loss
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            del loss, gradients
        return followed.moments

    few, more = min(2, len(x)), min(4, len(x))
    moments(few)  # what is made once and kept is there from now on
    least, most = moments(few), moments(more)
    if len(least) != len(most):  # a network that does other things with other batches
        least, most = [max(least)], [max(most)]
    lines = []
    for one, other in zip(least, most, strict=True):
        slope = max(0, (other - one) // (more - few)) if more > few else one // few
        lines.append((max(0, one - few * slope), slope))
    fixed, per_example = max(lines, key=lambda line: line[0] + batch_size * line[1])
    parameters, optimizer = kept_bytes(model, guide)
    return MemoryNeed(
        parameters=parameters,
        optimizer=optimizer,
        fixed=fixed,
        # The loader makes the next batch while this one is still there.
        per_example=per_example + 2 * (x[:1].nbytes + y[:1].nbytes),
        batch_size=batch_size,
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes that may still be allocated, or None where the system does not say.

    On the CPU: what Linux calls available, or what the control group (a container's limit) leaves
    if that is less. On CUDA: what is free, and what torch holds without using it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [_meminfo(), *_control_groups()]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def check_memory(need: MemoryNeed, device: torch.device, present: int = 0) -> None:
    """Raise ``MemoryError`` where training cannot fit.

    Args:
        need: by `memory_need`.
        device: to train on.
        present: bytes of it that lie there already.
    """
    available = available_memory(device)
    missing = need.total - present
    if available is None or missing <= available:
        return

    def amount(size: int) -> str:
        return f"{size / 2**20:,.1f} MiB"

    advice = "use a smaller batch or network, or a tied variance"
    if need.step > need.total / 2 and need.per_example:
        room = (available - (missing - need.step) - need.fixed) // need.per_example
        if room >= 1:
            advice = f"a batch_size of {room} might fit; or use a smaller network"
    raise MemoryError(
        f"training needs about {amount(missing)} more on {device}, {amount(available)} are "
        f"available: parameters {amount(need.parameters)}, optimiser {amount(need.optimizer)}, "
        f"a step {amount(need.step)} (of which {need.per_example / 2**10:,.1f} KiB for each "
        f"of {need.batch_size} examples); {advice}"
    )


def _meminfo() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_groups() -> Iterable[int]:
    """What the limits of the process's control groups (version 2, or 1) leave."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, usage, cache = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        base = Path("/sys/fs/cgroup") / root
        # Inside a container the group's own path may not be mounted, but as the root.
        for folder in {base, base / path.lstrip("/")}:
            bound, used = _number(folder / limit), _number(folder / usage)
            if bound is None or used is None:
                continue
            freed = sum(
                int(entry.split()[1])
                for entry in _lines(folder / "memory.stat")
                if entry.split()[0] == cache
            )
            yield max(0, bound - used + freed)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None
