"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with(parent: int | None = None) -> None:
    """Have the kernel kill this process when the one that started it ends, however that ends (Linux; else nothing).

    Left alone, it would go on writing files beside the run that takes its killed parent's place.

    Args:
        parent: process number of the parent as it was a moment ago. If another one is there by now, it has died
            already, and this process ends at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
