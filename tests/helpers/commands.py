"""Call the project's commands in this process: torch and transformers, seconds of work, are imported once."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock


@dataclass
class Done:
    """How a command has ended, as :class:`subprocess.CompletedProcess` says it."""

    returncode: int
    stdout: str
    stderr: str


def call_here(module: str, *words: object) -> Done:
    """What ``python -m sdumc.bin.MODULE WORDS...`` does and says."""

    def body() -> None:
        command = importlib.import_module(f"sdumc.bin.{module}")
        command.run(command.main, own_process=False)

    # As `python -m` has it: messages name the command by it.
    with mock.patch.object(sys.modules["__main__"], "__spec__", ModuleSpec(f"sdumc.bin.{module}", None)):
        return run_here([f"{module}.py", *map(str, words)], body)


def script_here(path: Path, *words: object) -> Done:
    """What ``python PATH WORDS...`` does and says."""
    return run_here([str(path), *map(str, words)], lambda: runpy.run_path(str(path), run_name="__main__"))


def run_here(argv: list[str], body: Callable[[], object]) -> Done:
    """Run ``body`` with these words as its command line; logging and signals are afterwards as they were before."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers, level = logging.root.handlers[:], logging.root.level
    signals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.argv", argv):
        try:
            body()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            code = 1
            traceback.print_exc(file=err)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)
    return Done(code, out.getvalue(), err.getvalue())
