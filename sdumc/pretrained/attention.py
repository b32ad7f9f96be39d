"""Which earlier positions a causal LM's layers look at: all of them, or a sliding window.

The masks that transformers makes itself count columns. In our search and teacher forcing, a column of the cache is not
a position (the beams of an utterance share a row), so these masks are made here, from positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdumc.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as configs name them


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Q, C) bool, True where a query may look -> (B, 1, Q, C) with 0 there and the lowest number elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)


@dataclass(frozen=True)
class Attention:
    """How far each kind of layer of an LM looks back.

    Attributes:
        reach: kind of layer -> positions that it sees, its own included; None for all.
        per_kind: the model takes a mask for each kind (a dict), not a single one.
    """

    reach: Mapping[str, int | None]
    per_kind: bool = False

    def mask(self, allowed: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Any:
        """The ``attention_mask`` of a forward pass.

        Args:
            allowed: (B, Q, C) bool, which columns a query may look at, however far back they are.
            queries: (B, Q) their positions. keys: (B, C) the columns' positions.

        Returns:
            (B, 1, Q, C), added to the attention's scores; with ``per_kind`` a dict of them.
        """
        masks = {kind: additive_mask(self._near(kind, allowed, queries, keys), dtype) for kind in self.reach}
        return masks if self.per_kind else next(iter(masks.values()))

    def shortened(self, window: int) -> Attention:
        """The same with windows of ``window`` positions."""
        return Attention({k: window if reach else None for k, reach in self.reach.items()}, self.per_kind)

    def _near(self, kind: str, allowed: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        reach = self.reach[kind]
        if reach is None:
            return allowed
        return allowed & (keys[:, None] > queries[:, :, None] - reach)


EVERYTHING = Attention({FULL: None})


def possible_attentions(config: Any, name: str) -> list[Attention]:
    """What a model may do, as its config reads, the likeliest first; :mod:`sdumc.pretrained.trial` decides.

    Raises:
        UserError: some layers are of a kind that cannot be driven with a mask by positions.
    """
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise UserError(
            f"{name}: this LLM has layers of the kind {', '.join(unknown)}; only full and sliding-window attention are "
            "supported, give another LLM"
        )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise UserError(
            f"{name}: this LLM's local attention counts columns of the cache, not positions; give another LLM"
        )
    window = getattr(config, "sliding_window", None)
    if SLIDING in kinds:
        return [Attention({FULL: None, SLIDING: window}, per_kind=True)]
    if window and not kinds:
        return [Attention({SLIDING: window}), EVERYTHING]
    return [EVERYTHING]


@contextlib.contextmanager
def short_windows(config: Any, window: int) -> Iterator[None]:
    """The sliding window of ``config``, if it has one, made ``window`` long, so that few tokens go beyond it."""
    kept = getattr(config, "sliding_window", None)
    if not kept:
        yield
        return
    try:
        config.sliding_window = window
        yield
    finally:
        config.sliding_window = kept


def longest_context(model: Any, config: Any) -> int | None:
    """How many positions an LLM can read in a search that computes each of them once; None where nothing limits it.

    A table of positions ends. Rotary embeddings of the kinds `dynamic` and `longrope` change all their frequencies at
    a certain length, for which keys that are already in the cache are wrong.
    """
    limits = []
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for settings in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        kind = settings.get("rope_type") or settings.get("type")
        most = getattr(config, "max_position_embeddings", None)
        if kind == "longrope":
            limits.append(
                settings.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or most
            )
        elif kind == "dynamic":
            limits.append(most)
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, torch.nn.Embedding) and module is not tokens and last in _TABLES:
            limits.append(module.num_embeddings - getattr(module, "offset", 0))
        elif isinstance(getattr(module, "embed_positions", None), Tensor):  # GPT-J's and CodeGen's sines
            limits.append(module.embed_positions.shape[0])
    return min((limit for limit in limits if limit), default=None)


_TABLES = ("wpe", "embed_positions", "position_embeddings")
