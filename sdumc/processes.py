"""Signals that end a process: noted until its state is saved, and the kernel's, when its parent ends."""

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


class StopSignal:
    """Notes that one of the given signals came, for a loop to act on between two steps."""

    def __init__(self, *signals: int):
        self.raised = False
        for number in signals:
            signal.signal(number, self._raise)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # utils/ranks.py holds SIGUSR1 back until now

    def _raise(self, number: int, frame) -> None:
        self.raised = True
