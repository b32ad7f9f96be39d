"""A short trial of every model when it is loaded: our batches, masks and cache must not change what it computes.

LLMs: two contexts of different lengths are searched in a batch, with two beams, and the winners are read once more. The
reference is the model's own forward pass over each of them alone, without our masks and without a cache. An LLM whose
layers do more than attention by positions (recurrent layers, ALiBi, inputs per layer) is found here in a second,
instead of in a traceback after hours or in wrong features.

Encoders, recognisers and vision models: a clip or picture must give the same alone and in a batch. Padding, batch
statistics and randomness make some architectures break that rule. No list of names is complete, so every model is
tried on a little seeded noise before any work.

`predict` and `demo`, whose work takes seconds, remember in the user's cache folder which models have passed
(:func:`remember_passed`): by the fingerprint of the model, the versions of the libraries and of this package's sources,
and the device.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdumc.errors import UserError
from sdumc.files import recall, remember
from sdumc.pretrained.attention import Attention, possible_attentions, short_windows
from sdumc.pretrained.beam_search import Winner
from sdumc.pretrained.folders import fingerprint, first_line

if TYPE_CHECKING:
    from sdumc.pretrained.llm import SpeechLLM


_TOKENS = 4  # written in a trial
_LENGTHS = (2, 7)  # of the contexts
_WINDOW = 3  # positions that windows are shortened to, so that the trial goes beyond them
# Largest relative difference of a state, and largest difference of the mean log-probability of a token. In the low
# precisions, the order of summation alone changes states by a few per cent in deep models.
_STATES_TOLERANCE = {torch.float32: (0.01, 0.02), torch.float16: (0.1, 0.5), torch.bfloat16: (0.15, 0.5)}


class _Unlike(Exception):
    """A trial's outcome is not the reference; the message says in what."""


_remembers = False


def remember_passed() -> None:
    """From now on, a model that passed on this machine is not tried again."""
    global _remembers
    _remembers = True


def passed(folder: Path, device: torch.device, settings: Sequence[Any], attempt: Callable[[], list]) -> list:
    """The plain values that the trial ``attempt()`` of a model gives; or gave before, with the same settings."""
    if not _remembers:
        return attempt()
    others = sorted([f.name, f.stat().st_size] for f in folder.iterdir() if f.is_file())
    key = [fingerprint(folder), others, _versions(), _processor(device), [str(s) for s in settings]]
    found = recall("trial", key)
    if not isinstance(found, list):
        found = attempt()
        remember("trial", key, found)
    return found


@cache
def _versions() -> list[str]:
    sources = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(file.read_bytes())
    names = ("torch", "transformers", "tokenizers", "numpy", "pillow")
    return [sources.hexdigest(), *(importlib.metadata.version(name) for name in names)]


def _processor(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


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


_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.2}
R = TypeVar("R")


def trial_waves() -> list[np.ndarray]:
    """Three clips (T_i,) of noise at 16 kHz, 0.6, 0.25 and 0.43 s: the same at every call."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, size).astype(np.float32) for size in (9600, 4000, 6900)]


def trial_pictures() -> list[np.ndarray]:
    """Three square RGB pictures of 64, 80 and 96 pixels, uint8: the same at every call."""
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(3)]
    return [np.kron(c, np.ones((n, n, 1), np.uint8)) for c, n in zip(coarse, (8, 10, 12), strict=True)]


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """How much two results differ: the largest root mean square over D of a frame's difference.

    Each dimension is measured in its own root mean square over ``first``: some encoders have a few dimensions with
    values a hundred times those of the others.

    Args:
        first, second: tensors (T_i, D), one for each clip or picture.

    Returns:
        0 for equal results; infinite if shapes differ or a value is not finite.
    """
    if [x.shape for x in first] != [x.shape for x in second]:
        return float("inf")
    a, b = torch.cat(list(first)).double(), torch.cat(list(second)).double()
    scale = a.square().mean(0).sqrt()
    scale = scale.clamp_min(1e-3 * float(scale.square().mean().sqrt()) + 1e-12)
    worst = float(((a - b) / scale).square().mean(1).sqrt().max())
    return worst if np.isfinite(worst) else float("inf")


def same(first: Sequence[Tensor], second: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether two results, computed in ``dtype``, differ by no more than its rounding."""
    return difference(first, second) <= _TOLERANCE[dtype]


def attempt(compute: Callable[[], R], refusal: str) -> R:
    """``compute()``; any failure within the model becomes a :class:`UserError` that begins with ``refusal``."""
    try:
        return compute()
    except UserError:
        raise
    except Exception as e:  # architectures that do not fit raise all kinds of errors
        raise UserError(f"{refusal}: {first_line(e)}") from None


def try_clips(
    compute: Callable[[Sequence[np.ndarray]], list[Tensor]],
    num_frames: Callable[[int], int] | None,
    dtype: torch.dtype,
    refusal: str,
) -> tuple[bool, list[Tensor]]:
    """Try a model on three clips alone, again, and in a batch.

    Args:
        compute: clips (T_i,) at 16 kHz -> (frames_i, D). num_frames: frames that a clip of so many samples must give.
        refusal: how the error begins, with the model's folder.

    Returns:
        Whether the model must be given one clip at a time, as its frames depend on what else is in the batch; and the
        frames of the three clips alone.

    Raises:
        UserError: it fails on a single clip, gives another number of frames or values that are not finite, or does
            not repeat itself.
    """
    waves = trial_waves()

    def alone() -> list[Tensor]:
        return [compute([w])[0] for w in waves]

    first = attempt(alone, refusal)
    for wave, frames in zip(waves, first, strict=True):
        if num_frames is not None and len(frames) != num_frames(len(wave)):
            expected, seconds = num_frames(len(wave)), len(wave) / 16000
            raise UserError(
                f"{refusal}: {len(frames)} frames for {seconds:g} s of sound, where {expected} are expected"
            )
        if not bool(torch.isfinite(frames).all()):
            raise UserError(f"{refusal}: its output is not finite in {str(dtype).removeprefix('torch.')}")
    if not same(first, attempt(alone, refusal), dtype):
        raise UserError(f"{refusal}: the same clip gives another result each time")
    try:
        together = compute(waves)
    except Exception:  # it works alone
        return True, first
    return not same(first, together, dtype), first
