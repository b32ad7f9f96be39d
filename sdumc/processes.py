"""This process: the versions it runs with, signals that ask it to stop, and how it ends.

It ends with its exit code, or together with its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import platform
import signal
import sys
from collections.abc import Mapping
from typing import NoReturn

from sdumc import __version__

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
_cleanup = False


def skip_teardown(cleanup: bool = False) -> None:
    """Have :func:`exit_process` end this process at once, without the destructors of libraries. ``cleanup``: what was
    registered to be done at the end (such as removing temporary folders) is done."""
    global _teardown, _cleanup
    _teardown, _cleanup = False, cleanup


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code; what was printed and logged is written first."""
    if _cleanup:
        atexit._run_exitfuncs()
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


def installed_versions() -> dict[str, str]:
    """Versions of sdumc, torch, transformers and Python; a package that is not installed is left out."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"sdumc": __version__}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package)  # read from its metadata: importing it would take seconds
        except PackageNotFoundError:
            continue
    return {**versions, "python": platform.python_version()}


def different_major(a: Mapping[str, str], b: Mapping[str, str]) -> str | None:
    """The first package of which ``a`` and ``b`` name versions with different first numbers, in words, or None."""
    for package in a:
        if package in b and a[package].split(".")[0] != b[package].split(".")[0]:
            return f"{package} {a[package]} and {b[package]}"
    return None


def all_versions(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    """Both lists as one; where they differ, both versions with a comma: ``5.23.0, 5.24.0``."""
    both = dict(a)
    for package, new in b.items():
        known = both.get(package, "").split(", ") if package in both else []
        both[package] = ", ".join([*known, *(v for v in new.split(", ") if v not in known)])
    return both
