"""Chosen hidden states of a transformers model, without keeping all of them in memory.

`output_hidden_states=True` holds every layer of every position until the pass ends. A :class:`StateTap` adds up
just the layers asked for, at just the positions asked for, as they are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sdumc.errors import UserError


def find_decoder(base: nn.Module, name: str) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the layers of a headless transformers model (OPT: ``decoder``), and the layers."""
    for path in ("layers", "encoder.layers", "decoder.layers", "h"):
        owner: Any = base
        *above, last = path.split(".")
        for part in above:
            owner = getattr(owner, part, None)
        stack = getattr(owner, last, None)
        if isinstance(stack, nn.ModuleList):
            return owner, stack
    raise UserError(f"{name}: the layers of {type(base).__name__} were not found; this architecture is not supported")


def decoder_layers(base: nn.Module, name: str) -> nn.ModuleList:
    """The stack of layers of a headless transformers model."""
    return find_decoder(base, name)[1]


def layer_index(layer: int, num_layers: int, name: str) -> int:
    """``layer`` as in ``hidden_states[layer]``: 0 the embeddings, ``num_layers`` (or -1) the final output.

    Raises:
        UserError: there is no such layer.
    """
    index = layer if layer >= 0 else num_layers + 1 + layer
    if not 0 <= index <= num_layers:
        raise UserError(
            f"{name}: no layer {layer}; with {num_layers} layers choose from {-num_layers - 1} to {num_layers}"
        )
    return index


class _FirstLayerReached(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


@torch.inference_mode()
def embedding_scale(base: nn.Module, dim: int, name: str) -> float | None:
    """The factor by which a model multiplies ``inputs_embeds`` before its first layer, from a pass that ends there.

    It is 1 for most models. Transformers 4 scales those of Gemma 1 and 2 by sqrt(dim), transformers 5 does not.

    Args:
        base: a headless transformers model. dim: the width D of its input embeddings.

    Returns:
        The factor, or None where the first layer's input is no multiple of the embeddings (a norm or a projection
        stands between).
    """
    found: list[torch.Tensor] = []

    def stop(_module, args, kwargs):
        found.append((args[0] if args else kwargs["hidden_states"]).float())
        raise _FirstLayerReached

    parameter = next(base.parameters())
    probe = torch.linspace(-1, 1, dim, device=parameter.device).to(parameter.dtype)
    handle = decoder_layers(base, name)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        # Zeros: what the model adds (position embeddings). Twice the probe: whether the model scales or normalises.
        rows = torch.stack([torch.zeros_like(probe), probe, 2 * probe])
        base(inputs_embeds=rows[:, None], use_cache=False)
    except _FirstLayerReached:
        pass
    finally:
        handle.remove()
    if not found or found[0].shape != (3, 1, dim):
        return None
    added, single, double = found[0][:, 0]
    given = probe.float()
    scale = float((single - added) @ given / (given @ given))
    expected = torch.stack([scale * given, 2 * scale * given])
    if float((torch.stack([single, double]) - added - expected).norm()) > 0.02 * float(expected.norm()):
        return None
    return 1.0 if abs(scale - 1) < 0.01 else round(scale, 4)


class StateTap:
    """Sum of ``hidden_states[layer]`` over ``layers``, taken with hooks during forward passes of ``base``.

    Used as a context manager; after a forward pass :attr:`states` is a float32 (B, T, D) tensor, or (B, 1, D) if
    ``last_only``. ``hidden_states[i]`` is the input of layer i; the last entry is the model's final (normalised)
    output, as transformers defines it.
    """

    def __init__(self, base: nn.Module, layers: Sequence[int], name: str = "model", last_only: bool = False):
        # A causal LM may call the decoder without the module around it: the output is taken from the decoder.
        self._owner, self._stack = find_decoder(base, name)
        self._name = name
        self._wanted = [layer_index(layer, len(self._stack), name) for layer in layers]
        self._last_only = last_only
        self._handles: list = []
        self.states: torch.Tensor | None = None
        self._added = 0

    def _add(self, hidden: torch.Tensor, times: int) -> None:
        hidden = (hidden[:, -1:] if self._last_only else hidden).detach().float() * times
        if self.states is not None and self.states.shape != hidden.shape:
            raise UserError(
                f"{self._name}: the layers to be summed have states of different widths ({self.states.shape[-1]} and "
                f"{hidden.shape[-1]}); choose one layer, or layers without the last"
            )
        self.states = hidden if self.states is None else self.states + hidden
        self._added += times

    def __enter__(self) -> StateTap:
        for index in sorted(set(self._wanted)):
            times = self._wanted.count(index)
            if index < len(self._stack):

                def before(_module, args, kwargs, times=times):
                    self._add(args[0] if args else kwargs["hidden_states"], times)

                self._handles.append(self._stack[index].register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(_module, _args, output, times=times):
                    self._add(output[0] if isinstance(output, tuple) else output.last_hidden_state, times)

                self._handles.append(self._owner.register_forward_hook(after))
        return self

    def __exit__(self, *_error) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> torch.Tensor:
        """Return the states of the last forward pass, and clear them.

        Raises:
            UserError: not every layer asked for was seen just once, so that the sum is not the one asked for.
        """
        states, added, self.states, self._added = self.states, self._added, None, 0
        if states is None or added != len(self._wanted):
            raise UserError(
                f"{self._name}: {added} of {len(self._wanted)} layers were seen in a forward pass; this architecture "
                "is not supported"
            )
        return states
