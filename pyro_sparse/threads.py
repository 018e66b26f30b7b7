"""One pass at a time: what a pass through a network changes for a moment is everybody's."""

from __future__ import annotations

import threading

__all__ = ["ALONE"]

ALONE = threading.RLock()
"""Held while a model, a guide or a network runs in a state that is not its usual one.

Pyro's stack of handlers and its settings belong to the process; a network's mode, its parameters in
``functional_call`` and its running statistics belong to the network: two threads that predict would
change them under each other. The second one waits for the first one's draw.
"""
