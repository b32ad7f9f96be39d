"""Ranks: joining the group, gathering rows with their gradients, adding up gradients.

The loss is a function of the whole global batch (RMSE terms and Rank-N-Contrast do not split into per-rank means), so
every rank gathers the small per-utterance outputs, computes the same loss, and differentiates it for its own rows.
The sum of the ranks' parameter gradients is then exactly the gradient of that loss. DistributedDataParallel would
average instead of sum, and would need every rank to have rows; a batch smaller than the number of ranks leaves some
without.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdumc.errors import UserError
from sdumc.machine import pick_device, skip_teardown


@dataclass(frozen=True)
class Ranks:
    """This process among all: number ``rank`` of ``size``, and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _environment() -> tuple[int, int, int] | None:
    """(rank, size, local rank) from torchrun's variables, else from Slurm's when a step of several tasks runs us."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    # SLURM_NTASKS is not used: batch scripts and interactive sessions have it too, and are a single process.
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
    return None


def join(device: str = "auto") -> Ranks:
    """Join the process group if a launcher started several ranks, and choose the device.

    Args:
        device: as :func:`sdumc.machine.pick_device` takes it.

    Raises:
        UserError: a GPU is asked for and there is none for this rank, or Slurm started several ranks without saying
            where they meet.
    """
    rank, size, local_rank = _environment() or (0, 1, 0)
    # torchrun and utils/ranks.py show each rank all GPUs of the machine, and say how many ranks it has.
    where = pick_device(device, local_rank, size, own_gpu_only="LOCAL_WORLD_SIZE" not in os.environ)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size > 1:
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise UserError("several ranks, but MASTER_ADDR and MASTER_PORT do not say where they meet; use run.sh")
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(minutes=30),
            device_id=where if where.type == "cuda" else None,  # else NCCL warns that it has to guess
        )
    return Ranks(rank, size, where)


def leave(ranks: Ranks) -> None:
    """Leave the group together: if a rank exits while another still communicates, that one fails.

    Everything is on disk by now. gloo's threads abort now and then when they are torn down ("terminate called without
    an active exception"), which would make a finished run a failed one; so its ranks end without tearing down.
    """
    if ranks.size > 1 and dist.is_initialized():
        dist.barrier()
        if dist.get_backend() == "gloo":
            skip_teardown()
        else:
            dist.destroy_process_group()


def gather_rows(x: Tensor, total: int, ranks: Ranks) -> Tensor:
    """Concatenate the rows of all ranks; this rank's keep their gradient, the others are constants.

    Args:
        x: (b, ...) this rank's rows of a global batch of ``total``, of which rank r holds rows r, r + size, ...
        total: rows of the global batch.

    Returns:
        (total, ...), the same on every rank up to gradients, rank after rank.
    """
    if ranks.size == 1:
        return x
    counts = [len(range(r, total, ranks.size)) for r in range(ranks.size)]
    most = max(counts)
    padded = torch.cat([x.detach(), x.new_zeros(most - x.shape[0], *x.shape[1:])])
    blocks = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(blocks, padded.contiguous())
    rows = [block[:count] for block, count in zip(blocks, counts, strict=True)]
    rows[ranks.rank] = x
    return torch.cat(rows)


def sum_gradients(parameters: Iterable[torch.nn.Parameter], flag: bool, ranks: Ranks) -> bool:
    """Sum the ranks' gradients in place; True if ``flag`` is set on any rank (one message carries both)."""
    if ranks.size == 1:
        return flag
    parameters = [p for p in parameters if p.requires_grad]
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    flat = torch.cat([*parts, parts[0].new_tensor([float(flag)])])
    dist.all_reduce(flat)
    start = 0
    for p in parameters:
        p.grad = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    return bool(flat[-1] > 0)


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """Every rank's small picklable value, in rank order, on every rank."""
    if ranks.size == 1:
        return [value]
    values: list[Any] = [None] * ranks.size
    dist.all_gather_object(values, value)
    return values


def barrier(ranks: Ranks) -> None:
    """Wait until every rank is here."""
    if ranks.size > 1:
        dist.barrier()
