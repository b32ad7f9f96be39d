"""Stop a training at an exact moment, however fast the machine: environments for a process that is started.

They let the process find ``sitecustomize.py`` beside this file, which Python imports at its start.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def with_hooks(env: Mapping[str, str], **hooks: object) -> dict[str, str]:
    """``env`` with the folder of ``sitecustomize.py`` first on PYTHONPATH, and its settings."""
    paths = os.pathsep.join(filter(None, [str(FOLDER), env.get("PYTHONPATH")]))
    return {**env, "PYTHONPATH": paths, **{name: str(value) for name, value in hooks.items()}}


def at_step(env: Mapping[str, str], step: int, number: signal.Signals, target: str = "self") -> dict[str, str]:
    """Send signal ``number`` right after the training's ``step``-th step, counted from its start in this process.

    ``target``: ``self``, or ``parent``, which is expected to pass the signal on: the step does not end before it came.
    Of several ranks the first sends it.
    """
    return with_hooks(env, SDUMC_TEST_AT_STEP=f"{step} {int(number)} {target}")


def held_at_start(env: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Hold each training process before its first line, until ``folder/go`` exists; it writes ``folder/held.RANK``."""
    return with_hooks(env, SDUMC_TEST_HELD=folder)


def wait_until(happened: Callable[[], object], what: Callable[[], str] = lambda: "", seconds: float = 600) -> None:
    """Wait for a condition. ``seconds`` only guards against waiting for ever; ``what`` tells what there is instead."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:.0f} s: {what()}"
        time.sleep(0.02)


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits until the process lets it in."""
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), flags=re.M)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)
