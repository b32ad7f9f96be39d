"""What to do when a GPU's memory is too small for a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from sdumc.errors import UserError

log = logging.getLogger("sdumc")
T = TypeVar("T")
R = TypeVar("R")


def halve_when_out_of_memory(
    items: Sequence[T], compute: Callable[[Sequence[T]], list[R]], describe: Callable[[T], str] | None = None
) -> list[R]:
    """``compute(items)``; when memory runs out on the GPU, the two halves one after another, and so on.

    Args:
        describe: what to call an item in the error; by default, items are ids of utterances.

    Raises:
        UserError: memory does not suffice for a single item.
    """
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
