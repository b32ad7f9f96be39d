"""Where models run: ``--device`` of every command, which GPU a rank gets, and batches that do not fit into it."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

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
