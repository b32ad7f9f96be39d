"""Signals that ask a process to stop, and how a process ends: with its exit code, or together with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from typing import NoReturn

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


_teardown = True


def skip_teardown() -> None:
    """Have :func:`exit_process` end this process at once, without the destructors of libraries."""
    global _teardown
    _teardown = False


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code; what was printed and logged is written first."""
    logging.shutdown()
    sys.stderr.flush()
    sys.stdout.flush()
    if not _teardown:
        os._exit(code)
    sys.exit(code)


class StopSignal:
    """Records in ``raised`` that one of the given signals came, so that a loop can stop between two steps."""

    def __init__(self, *signals: int):
        self.raised = False
        for number in signals:
            signal.signal(number, self._raise)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # utils/ranks.py starts ranks with SIGUSR1 blocked

    def _raise(self, number: int, frame) -> None:
        self.raised = True
