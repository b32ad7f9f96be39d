"""Signals that ask a process to stop, and ending a process together with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, even if the parent is killed. No effect outside Linux.

    Otherwise it would continue to write files while the next run writes the same ones.

    Args:
        parent: the parent's process number. If the parent has another number by now, the expected one has died
            already, and this process exits at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


class StopSignal:
    """Records in ``raised`` that one of the given signals came, so that a loop can stop between two steps."""

    def __init__(self, *signals: int):
        self.raised = False
        for number in signals:
            signal.signal(number, self._raise)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # utils/ranks.py starts ranks with SIGUSR1 blocked

    def _raise(self, number: int, frame) -> None:
        self.raised = True
