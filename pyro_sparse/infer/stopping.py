"""Ctrl-C and SIGTERM as a request: training finishes its step, saves, and stops."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from .history import Run

__all__ = ["Interrupted", "StopRequest"]


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has saved what it had.

    Attributes:
        run: the epochs that are done.
        signum: the signal, ``signal.SIGINT`` or ``signal.SIGTERM``.
        exit_code: by convention of a process that ends for it, 130 or 143.
    """

    def __init__(self, message: str, run: Run, signum: int) -> None:
        super().__init__(message)
        self.run, self.signum = run, signum
        self.exit_code = 128 + signum


class StopRequest:
    """Context that turns the first SIGINT or SIGTERM into ``signum``; a second one acts at once.

    Only in the main thread, and only in place of the default handlers: those that the caller has
    set, and signals that are ignored, stay as they are. All handlers are restored on leaving.
    """

    SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def __init__(self) -> None:
        self.signum: int | None = None
        self._replaced: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum, default in self.SIGNALS.items():
                if signal.getsignal(signum) == default:
                    self._replaced[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._replaced:
            signal.signal(*self._replaced.popitem())

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            self._restore()
            signal.raise_signal(signum)
        self.signum = signum
