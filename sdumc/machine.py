"""What a command runs on: its device and versions, signals that ask it to stop, and the end of its process.

``--device`` is the same in every command, and so is which GPU a rank gets, and what is done about batches that do not
fit into its memory. A process ends with its exit code, or together with its parent.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import logging
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sdumc import __version__
from sdumc.errors import UserError

if TYPE_CHECKING:
    import torch


log = logging.getLogger("sdumc")
T = TypeVar("T")
R = TypeVar("R")

_NAME = re.compile(r"auto|cpu|cuda(:\d+)?")
_CHOICES = "auto, cpu, cuda or cuda:N"


def add_device_option(group: Any) -> None:
    """``--device``, the same in every command that runs a model."""
    group.add_argument(
        "--device",
        type=_device_name,
        default="auto",
        metavar="NAME",
        help="auto (a GPU if there is one, else the CPU), cpu, cuda (an error without a GPU), or cuda:N (GPU number N)",
    )


def pick_device(name: str = "auto", local_rank: int = 0, ranks: int = 1, own_gpu_only: bool = True) -> torch.device:
    """The device that ``name`` means on this machine.

    Args:
        name: ``auto`` (this rank's GPU if there is one, else the CPU), ``cpu``, ``cuda`` (this rank's GPU), or
            ``cuda:N`` (GPU number N, for a single rank).
        local_rank: number of this process among the ranks on its machine. Where several GPUs are visible, rank r gets
            GPU r. Slurm with --gpus-per-task shows each rank only its own GPU, which is then number 0.
        ranks: how many ranks there are in all.
        own_gpu_only: a rank that sees one GPU may be a task to which Slurm shows no other; False: it sees them all.

    Raises:
        UserError: the name is none of these, or the GPU that is asked for is not visible here.
    """
    import torch

    if not _NAME.fullmatch(name):
        raise UserError(f"--device {name}: expected {_CHOICES}")
    gpus = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if gpus == 0:
        if name.startswith("cuda"):
            kind = "" if torch.version.cuda or torch.version.hip else ", a CPU build"
            raise UserError(
                f"--device {name}: no GPU is visible here (PyTorch {torch.__version__}{kind}); "
                "use --device cpu, or ask the cluster for a GPU"
            )
        return torch.device("cpu")
    if ":" in name:
        number = int(name.partition(":")[2])
        if ranks > 1:
            raise UserError(f"--device {name}: one GPU is not for {ranks} ranks; use --device cuda")
        if number >= gpus:
            raise UserError(f"--device {name}: the {gpus} GPUs that are visible here have the numbers 0 to {gpus - 1}")
        return torch.device("cuda", number)
    if local_rank >= gpus and (gpus > 1 or not own_gpu_only):
        seen = "only one is" if gpus == 1 else f"only {gpus} are"
        raise UserError(f"rank {local_rank} of this machine has no GPU: {seen} visible; start fewer ranks")
    return torch.device("cuda", local_rank % gpus)


def _device_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected {_CHOICES}, not {text}")
    return text


def halve_when_out_of_memory(
    items: Sequence[T], compute: Callable[[Sequence[T]], list[R]], describe: Callable[[T], str] | None = None
) -> list[R]:
    """``compute(items)``; when memory runs out on the GPU, the two halves one after another, and so on.

    Args:
        describe: what to call an item in the error; by default, items are ids of utterances.

    Raises:
        UserError: memory does not suffice for a single item.
    """
    import torch

    try:
        return compute(items)
    except torch.cuda.OutOfMemoryError as e:
        message = str(e).splitlines()[0]
    # Outside the handler: the exception would keep the failed pass's tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(items) <= 1:
        item = describe(items[0]) if describe else f"utterance {items[0]!r}"
        raise UserError(
            f"{item} alone does not fit into the GPU's memory ({message}); use --dtype bf16, a larger GPU, or "
            "--device cpu"
        )
    half = (len(items) + 1) // 2
    log.warning("out of GPU memory with %d utterances; going on with batches of %d", len(items), half)
    halves = items[:half], items[half:]
    return [result for part in halves for result in halve_when_out_of_memory(part, compute, describe)]


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
