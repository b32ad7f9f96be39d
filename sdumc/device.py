"""Where models run: ``--device`` of every command, and which GPU a rank gets."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from sdumc.errors import UserError

if TYPE_CHECKING:
    import torch

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


def pick_device(name: str = "auto", local_rank: int = 0, ranks: int = 1) -> torch.device:
    """The device that ``name`` means on this machine.

    Args:
        name: ``auto`` (this rank's GPU if there is one, else the CPU), ``cpu``, ``cuda`` (this rank's GPU), or
            ``cuda:N`` (GPU number N, for a single rank).
        local_rank: number of this process among the ranks on its machine. Where several GPUs are visible, rank r gets
            GPU r. Slurm with --gpus-per-task shows each rank only its own GPU, which is then number 0.
        ranks: how many ranks there are in all.

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
    if gpus > 1 and local_rank >= gpus:
        raise UserError(f"rank {local_rank} of this machine has no GPU: only {gpus} are visible; start fewer ranks")
    return torch.device("cuda", local_rank % gpus)


def _device_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected {_CHOICES}, not {text}")
    return text
