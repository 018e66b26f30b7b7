"""Calls in processes of their own, several at a time.

A process a call: what one of them does to itself, as running out of memory, no other one sees.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from pyro_sparse.infer.stopping import StopRequest

__all__ = ["Failed", "call_in_processes"]

POLL = 0.5
"""Seconds after which a signal to this process is noticed at the latest."""


class Failed(ChildProcessError):
    """What a call raised, or what its process ended of; ``str()`` says it."""


def call_in_processes(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[tuple[int, Any]]:
    """Call a function with each of ``arguments``, ``jobs`` at a time; yield results as they come.

    Processes are started anew (spawned), with one torch thread each, so a script that gets here
    needs the usual ``if __name__ == "__main__":``. Ctrl-C and SIGTERM are for this process: it
    passes the request on, waits until all calls have stopped, and then does what the signal asks
    for; so it does where the caller leaves the iteration.

    Args:
        function: of a module's top level.
        arguments: of each call; they and the results are sent between processes.
        jobs: most processes at a time.

    Yields:
        The place of a call in ``arguments``, and its result, or a `Failed`.
    """
    context = multiprocessing.get_context("spawn")
    todo = list(enumerate(arguments))[::-1]
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    with StopRequest() as stop:
        try:
            while (todo or running) and stop.signum is None:
                while todo and len(running) < jobs:
                    index, own = todo.pop()
                    receiver, sender = context.Pipe(duplex=False)
                    started = context.Process(
                        target=_call, args=(function, own, sender), daemon=True
                    )
                    started.start()
                    sender.close()
                    running[receiver] = index, started
                # A result may be larger than a pipe holds: it is taken before the process ends.
                for ready in wait(list(running), POLL):
                    assert isinstance(ready, Connection)
                    index, process = running[ready]
                    result = _result(ready, process)
                    del running[ready]
                    yield index, result
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()
    if stop.signum is not None:
        signal.raise_signal(stop.signum)


def _result(receiver: Connection, process: BaseProcess) -> Any:
    """What a call returned, when its process has ended."""
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if result is None:
        code = process.exitcode or 0
        return Failed(f"its process was ended by {f'signal {-code}' if code < 0 else 'itself'}")
    value, error = result
    return value if error is None else Failed(error)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], sender: Connection) -> None:
    """Of the new process: send ``(result, None)``, or None and what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """Ask this process to stop when its parent is gone: killed, it could not ask itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
