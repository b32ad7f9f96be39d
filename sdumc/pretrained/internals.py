"""The inside of a transformers model: how far its layers look back, and their hidden states.

Attention. Layers of a causal LM look at all earlier positions, or at those in a sliding window. The masks that
transformers makes itself count columns. In our search and teacher forcing, a column of the cache is not a position (the
beams of an utterance share a row), so these masks are made here, from positions.

Their trial. When an LLM is loaded (:func:`find_attention`), two contexts of different lengths are searched in a batch,
with two beams, and the winners are read once more. The reference is the model's own forward pass over each of them
alone, without our masks and without a cache. An LLM whose layers do more than attention by positions (recurrent layers,
ALiBi, inputs per layer) is found here in a second, instead of in a traceback after hours or in wrong features.

States. `output_hidden_states=True` holds every layer of every position until the pass ends. A :class:`StateTap` adds up
just the layers asked for, at just the positions asked for, as they are computed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdumc.errors import UserError

if TYPE_CHECKING:
    from sdumc.pretrained.beam_search import Winner
    from sdumc.pretrained.llm import SpeechLLM

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
    """What a model may do, as its config reads, the likeliest first; :func:`find_attention` decides.

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


_TOKENS = 4  # written in a trial
_LENGTHS = (2, 7)  # of the contexts
_WINDOW = 3  # positions that windows are shortened to, so that the trial goes beyond them
# Largest relative difference of a state, and largest difference of the mean log-probability of a token. In the low
# precisions, the order of summation alone changes states by a few per cent in deep models.
_STATES_TOLERANCE = {torch.float32: (0.01, 0.02), torch.float16: (0.1, 0.5), torch.bfloat16: (0.15, 0.5)}


class _Unlike(Exception):
    """A trial's outcome is not the reference; the message says in what."""


def find_attention(llm: SpeechLLM) -> Attention:
    """How far the layers of ``llm`` look back, by its config and by trial.

    Raises:
        UserError: this LLM cannot be searched in batches as we do it; the reason in one line.
    """
    name, config = str(llm.folder), llm.base.config
    _check_architecture(llm, name)
    reasons = []
    for attention in possible_attentions(config, name):
        try:
            with short_windows(config, _WINDOW):
                _try(llm, attention.shortened(_WINDOW))
            return attention
        except (UserError, torch.cuda.OutOfMemoryError):
            raise
        except _Unlike as e:
            reasons.append(str(e))
        except Exception as e:  # the forward pass of an architecture that we know nothing of may raise anything
            text = str(e).strip()
            reasons.append(f"{type(e).__name__}: {text.splitlines()[0][:150]}" if text else type(e).__name__)
    raise UserError(f"{name}: {type(llm.model).__name__} failed a trial ({reasons[0]}); give another LLM")


def _check_architecture(llm: SpeechLLM, name: str) -> None:
    """Refuse what is known to fail by how it is built, in any precision."""
    config, kind = llm.base.config, type(llm.model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: {kind} has an encoder of its own; give a decoder-only LLM")
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(type(llm.model).forward).parameters:
        raise UserError(
            f"{name}: {kind} takes no position ids (ALiBi or recurrent layers), which batches of prompts and beams "
            "need; give another LLM"
        )


@torch.inference_mode()
def _try(llm: SpeechLLM, attention: Attention) -> None:
    """Search, force, and compare with plain passes; raises :class:`_Unlike`, or whatever the model raises."""
    contexts = _contexts(llm)
    prompted = llm.read(contexts)
    columns = [keys.shape[2] for keys, _ in prompted.past if keys is not None]
    if columns != [max(_LENGTHS)] * llm.num_layers:
        raise _Unlike("not every layer keeps keys and values of all positions: recurrent, shared or hybrid layers")
    winners = llm.search(prompted, 2, _TOKENS, 1.0, attention, eos_ids=[-1])
    states = llm.force(prompted, [w.tokens for w in winners], attention)
    for context, winner, mine in zip(contexts, winners, states, strict=True):
        _compare(llm, context, winner, mine)


def _contexts(llm: SpeechLLM) -> list[Tensor]:
    """Embeddings (P, D) of tokens spread over the vocabulary, without random numbers."""
    size = min(llm.model.get_input_embeddings().weight.shape[0], len(llm.tokenizer))
    return [llm.embed([(5 + 7919 * (i + 13 * n)) % size for i in range(n)]) for n in _LENGTHS]


def _compare(llm: SpeechLLM, context: Tensor, winner: Winner, states: Tensor) -> None:
    """Compare one utterance with the model's own forward pass over context and winner.

    Args:
        states: (N + 1, D) of the winner's N tokens, as :meth:`SpeechLLM.force` gives them.
    """
    whole = torch.cat([context, llm.embed(winner.tokens).to(context)])
    mask = torch.ones(1, len(whole), dtype=torch.long, device=whole.device)
    output = llm.model(inputs_embeds=whole[None], attention_mask=mask, use_cache=False, output_hidden_states=True)
    hidden = output.hidden_states
    if len(hidden) != llm.num_layers + 1:
        raise _Unlike(f"{len(hidden)} hidden states of {llm.num_layers} layers")
    start = len(context) - 1
    expected = torch.stack([hidden[layer][0, start:].float() for layer in llm.layers]).sum(0)
    log_probs = torch.log_softmax(output.logits[0, start:-1].float(), dim=-1)
    tokens = torch.tensor(winner.tokens, device=whole.device)
    score = float(log_probs.gather(1, tokens[:, None]).mean())
    if not (expected.isfinite().all() and log_probs.isfinite().all()):
        raise UserError(
            f"{llm.folder}: this LLM computes NaN or infinity in {str(llm.dtype).removeprefix('torch.')}; use another "
            "--dtype (bf16 or fp32)"
        )
    if states.shape != expected.shape:
        raise _Unlike(f"states {tuple(states.shape)} where the model itself gives {tuple(expected.shape)}")
    apart = (states - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-6)
    # Where experts are chosen, rounding may choose another one for a token now and then: most tokens must agree.
    far = float(apart.max() if llm.dtype == torch.float32 else apart.median())
    most, most_score = _STATES_TOLERANCE[llm.dtype]
    if not far <= most:
        raise _Unlike(f"in a batch, its states are {100 * far:.0f}% off those of the text alone")
    if not abs(score - winner.score) <= most_score:
        raise _Unlike(
            f"in a search, its log-probabilities are {abs(score - winner.score):.2f} off those of the text alone"
        )


def longest_context(model: Any, tokens: nn.Module, config: Any) -> int | None:
    """How many positions an LLM can read in a search that computes each of them once; None where nothing limits it.

    A table of positions ends. Rotary embeddings of the kinds `dynamic` and `longrope` change all their frequencies at
    a certain length, for which keys that are already in the cache are wrong. ``tokens`` is the table of the tokens.
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
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, torch.nn.Embedding) and module is not tokens and last in _TABLES:
            limits.append(module.num_embeddings - getattr(module, "offset", 0))
        elif isinstance(getattr(module, "embed_positions", None), Tensor):  # GPT-J's and CodeGen's sines
            limits.append(module.embed_positions.shape[0])
    return min((limit for limit in limits if limit), default=None)


_TABLES = ("wpe", "embed_positions", "position_embeddings")


def find_decoder(base: nn.Module, name: str) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the layers of a headless transformers model (OPT: ``decoder``), and the layers."""
    for path in ("layers", "encoder.layers", "decoder.layers", "h", "blocks"):
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
