"""Freed memory that is kept for the next step."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys

__all__ = ["keep_freed_memory"]

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for this process instead of handing it back.

    A training step allocates and frees tensors of megabytes. By default glibc asks the system for
    each of these and returns it at once, and the system clears every page anew: a tenth to a fifth
    of a step of a 784-400-400-10 network on the CPU. The process then holds on to the most that it
    ever used.

    Returns:
        Whether the C library took it: glibc does, others are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _LARGEST)
        return bool(kept)
    return False
