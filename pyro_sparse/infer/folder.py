"""The files that training keeps in a run folder, and their order, so that a kill loses no epoch.

::

    metrics.jsonl                         a line an epoch
    checkpoint/last.safetensors           after the last epoch that is done
    checkpoint/best.safetensors           after the best one so far
    checkpoint/interrupted.safetensors    in the midst of an epoch, where a signal stopped the run
    checkpoint/lock                       held by the process that writes

After an epoch the best checkpoint is written first, then the last, then the line: what a kill
leaves out is made again, bit for bit, from the last checkpoint, which holds all lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .checkpoint import State, checkpoint_file, load_checkpoint, write_checkpoint

__all__ = ["RunFolder", "read_json", "write_json", "write_text"]


class RunFolder:
    """metrics.jsonl and checkpoint/ of a run.

    Args:
        path: the run folder; made by `prepare`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = checkpoint_file(path, "last")
        self.best = checkpoint_file(path, "best")
        self.interrupted = checkpoint_file(path, "interrupted")
        self.metrics = path / "metrics.jsonl"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Context in which this process is the only one that writes to the folder.

        The lock is the operating system's: it goes with its owner, also one that is killed.

        Raises:
            OSError: another process has it, or the folder cannot be written.
        """
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.last.parent / "lock", timeout=0, is_singleton=True)
            lock.acquire()
        except Timeout:
            raise OSError(
                f"{self.path} is being written by another process; wait for it or stop it, or "
                "choose another folder"
            ) from None
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def started(self) -> bool:
        """Whether there is anything that training has made."""
        return any(path.exists() for path in (self.last, self.best, self.interrupted, self.metrics))

    def prepare(self, checkpoint_bytes: int = 0) -> None:
        """Make the folder and see that it can be written.

        Args:
            checkpoint_bytes: size of one checkpoint; there must be room for the last, the best and
                the one that is being written.

        Raises:
            OSError: it cannot be made or written, or there is not enough room.
        """
        folder = self.last.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.safetensors.tmp"):
                leftover.unlink()  # of a process that was killed while it wrote
            probe = folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"\0")
            probe.unlink()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        kept = [path for path in (self.last, self.best) if path.is_file()]
        needed = (3 - len(kept)) * checkpoint_bytes
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"expected {needed / 2**20:,.1f} MiB of free space for the checkpoints in "
                f"{folder}, found {free / 2**20:,.1f} MiB; make room or choose another folder"
            )

    def load(self) -> tuple[State | None, State | None]:
        """The last checkpoint, and one in the midst of the epoch that follows it, if there are.

        Raises:
            FileNotFoundError: there are metrics of epochs without their checkpoint.
            ValueError: a checkpoint is damaged.
        """
        last = interrupted = None
        if self.last.exists() or self.metrics.exists():
            last = load_checkpoint(self.last)
        done = 0 if last is None else len(last.header["progress"]["history"])
        if self.interrupted.exists():
            found = load_checkpoint(self.interrupted)
            # Another epoch's was left behind by a kill between two writes.
            if len(found.header["progress"]["history"]) == done:
                interrupted = found
        return last, interrupted

    def save(self, state: State, history: Sequence[dict[str, Any]], best: bool) -> None:
        """Keep an epoch that is done.

        Raises:
            OSError: see :func:`~pyro_sparse.infer.checkpoint.write_checkpoint`.
        """
        if best:
            write_checkpoint(self.best, state)
        write_checkpoint(self.last, state)
        self.interrupted.unlink(missing_ok=True)
        with self.metrics.open("a") as file:
            file.write(_line(history[-1]))

    def rewrite_metrics(self, history: Sequence[dict[str, Any]]) -> None:
        """Bring metrics.jsonl to what the last checkpoint knows."""
        write_text(self.metrics, "".join(map(_line, history)))


def _unwritable(path: Path, error: OSError) -> OSError:
    return OSError(
        f"cannot write to {path}: {error}. Choose a folder that can be made and written to"
    )


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON, or nested deeper than anything that is written here.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, see `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: readers find the old one or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _line(metrics: dict[str, Any]) -> str:
    return json.dumps(metrics) + "\n"
