"""Loading pretrained models from local folders, and the short trial of each: it must compute the same in our hands.

Folders are checked first, the dtype is explicit, nothing comes from the network. Then our batches, masks and cache must
not change what the model computes.

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

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdumc.errors import UserError
from sdumc.files import read_json, recall, remember
from sdumc.pretrained.beam_search import Winner
from sdumc.pretrained.internals import Attention, possible_attentions, short_windows

if TYPE_CHECKING:
    from sdumc.pretrained.llm import SpeechLLM


log = logging.getLogger("sdumc")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OTHER_KIND = ("Unrecognized configuration class", "does not recognize this architecture")
_SMALL_FILE = 256 * 2**20  # bytes; a fingerprint reads smaller weight files whole


def model_folder(name: str | os.PathLike) -> Path:
    """The folder of a model given as a folder, or by its hub name if its files are in the local hub cache.

    Raises:
        UserError: there is no such folder, and the name is not in the cache (nothing is downloaded here).
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{path}: expected a model folder with a config.json in it, found a file")
    if str(name).count("/") > 1 or str(name).startswith((".", "/")):
        raise UserError(f"{path}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except Exception:
        raise UserError(
            f"{name}: neither a folder nor a model in the local hub cache. Give the folder of a downloaded model "
            "(nothing is fetched while a stage runs)"
        ) from None


def read_model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder as a dict; :class:`UserError` if it is absent or not JSON."""
    path = folder / "config.json"
    if (config := read_json(path, "fetch the model again", absent=None)) is None:
        raise UserError(f"{folder}: not a model folder, it has no config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path}: no `model_type` in it; this is not a transformers model folder")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors preferred, after checking that every shard is there.

    Raises:
        UserError: no weights, or a shard is absent or empty.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as e:
                raise UserError(f"{index}: cannot be read ({e!r}); fetch the model again") from None
            files = [folder / s for s in shards]
        elif (folder / single).exists():
            files = [folder / single]
        else:
            continue
        bad = [f.name for f in files if not f.is_file() or f.stat().st_size == 0]
        if bad:
            raise UserError(f"{folder}: incomplete model, missing or empty: {', '.join(bad)}; fetch the model again")
        return files
    raise UserError(
        f"{folder}: incomplete model, there is neither model.safetensors nor pytorch_model.bin "
        "(nor their index); fetch the model again"
    )


def whole_weights(folder: Path) -> list[Path]:
    """:func:`weight_files`, after checking that none is cut short; the weights themselves are not read.

    Raises:
        UserError: as there, or a file is cut short.
    """
    files = weight_files(folder)
    if short := [f.name for f in files if _cut_short(f)]:
        raise UserError(f"{folder}: incomplete model, cut short: {', '.join(short)}; fetch the model again")
    return files


def _cut_short(file: Path) -> bool:
    """Whether a weight file ends before its own table of contents says; nothing but that table is read."""
    with open(file, "rb") as f:
        start = f.read(8)
        if start[:2] == b"PK":  # a zip archive of torch, its table is at the end
            return not zipfile.is_zipfile(f)
        if file.suffix != ".safetensors":
            return False  # torch's old format has no table
        length = int.from_bytes(start, "little")
        try:
            table = json.loads(f.read(length)) if length < 100 * 2**20 else {}
            ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return True
        return len(start) < 8 or file.stat().st_size < 8 + length + max(ends, default=0)


def fingerprint(path: str | os.PathLike) -> str:
    """A short hash that changes with the weights: of whole files if small, else of their sizes, heads and tails."""
    path = Path(path)
    digest = hashlib.sha256()
    files = [path / "config.json", *weight_files(path)] if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as f:
            if size <= _SMALL_FILE:
                while block := f.read(2**22):
                    digest.update(block)
            else:
                digest.update(f.read(2**20))
                f.seek(-(2**20), os.SEEK_END)
                digest.update(f.read())
    return digest.hexdigest()[:16]


def load_model(
    model_class: Any,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    optional: tuple[str, ...] = (),
    supported: str = "",
) -> Any:
    """``model_class.from_pretrained(folder)`` for inference: eval mode, no gradients, all weights from the files.

    Transformers initialises weights that a checkpoint lacks at random. Here that is an error, except for parameters
    whose names begin with one of ``optional`` (those that the caller does not use). ``supported`` says, to a user whose
    model is of a kind that ``model_class`` does not have, which can be given.

    Raises:
        UserError: the folder is incomplete, damaged, or of another architecture.
    """
    kind = read_model_config(folder)["model_type"]
    safetensors = whole_weights(folder)[0].suffix == ".safetensors"
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=safetensors,
                output_loading_info=True,
            )
    except Exception as e:  # transformers, safetensors and torch raise different errors for a damaged folder
        if any(words in str(e) for words in _OTHER_KIND):  # a list of all the models that there are
            raise UserError(
                f"{folder}: a {kind} model cannot be used here: transformers has no {model_class.__name__} of that kind"
                + (f"; give {supported}" if supported else "")
            ) from None
        raise UserError(f"{folder}: cannot be loaded as {model_class.__name__}: {first_line(e)}") from None
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(("masked_spec_embed", *optional)))
    if missing:
        raise UserError(
            f"{folder}: incomplete model for {type(model).__name__}, {len(missing)} weights are not in the files, "
            f"e.g. {missing[0]}; fetch the model again or give another model"
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; :class:`UserError` if it has none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {first_line(e)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or the error's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


@contextlib.contextmanager
def quiet_transformers():
    """No progress bars or tables of weights in job logs: :func:`load_model` itself checks that all were loaded."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


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
