"""Training the projector, top to bottom: a warm start without the LLM's layers, if one is asked for; then cross entropy
of transcripts through the frozen LLM.

A step's input is laid out exactly as in simulation (:mod:`sdumc.pretrained.llm`), followed by the transcript and EOS,
on which alone the loss is taken.
"""

from __future__ import annotations

import functools
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from sdumc.errors import UserError
from sdumc.extraction.loop import read_ahead
from sdumc.files import read_yaml, write_text
from sdumc.machine import StopSignal, halve_when_out_of_memory, installed_versions
from sdumc.pretrained.beam_search import prompt_positions
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.projector import FILE_NAME, Projector, Vocabulary, positions, project, save_projector
from sdumc.pretrained.quality import word_error_rate
from sdumc.pretrained.speech import SpeechEncoder
from sdumc.training.checkpoint import CHECKPOINT, LOCK, SavedState, load_checkpoint, log_to, save_checkpoint
from sdumc.training.ctc import Normaliser, warm_loss
from sdumc.training.data import TranscribedSpeech, epoch_batches, spread

log = logging.getLogger("sdumc")

# What may differ between a run and the run that continues it. Models and data may have moved: hashes tell them apart.
FREE_TO_CHANGE = frozenset({"encoder", "llm", "train_data_dir", "valid_data_dir", "checkpoint_interval"})
_ELSEWHERE = "another --output (run.sh: --force starts again)"
_LOG_EVERY = 20.0  # seconds
_VALID_SECONDS = 400.0  # most seconds of sound in a batch of the valid set, padded

# The warm start. It costs so little that its settings matter less than those of the steps through the LLM.
_CTC_BATCH = 16
_CTC_RATE = 1e-3
_CTC_WARMUP = 50
_CTC_OTHERS = 1500  # tokens, drawn for each step, that a batch's own compete with


@dataclass(frozen=True)
class ProjectorSettings:
    """What decides a run's result, besides models and data; the defaults are those of the command line.

    Attributes:
        ctc_steps: steps of the warm start (:func:`warm_start`) before the others; 0 for none.
        steps: optimiser steps, each on ``batch_size`` utterances.
        learning_rate: reached after ``warmup_steps``; it then falls linearly to zero at ``steps``.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; 0 for any.
        k, hidden: encoder frames per LLM embedding, width of the hidden layer.
        seed: of weights and order.
        valid_interval: steps between measurements of the loss on ``valid_utterances``.
        wer_utterances: how many are transcribed in the end, with at most ``max_new_tokens`` tokens each.
        checkpoint_interval: steps between checkpoints.
        cache_mb: bounds the encoder outputs kept in memory; what does not fit is encoded anew each time.
    """

    ctc_steps: int
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip: float
    k: int
    hidden: int
    seed: int
    valid_interval: int
    valid_utterances: int
    wer_utterances: int
    max_new_tokens: int
    checkpoint_interval: int
    cache_mb: int


@dataclass
class ProjectorState(SavedState):
    """What a run is between two steps.

    Attributes:
        projector, optimiser: with all they have learned.
        step: steps done.
        parts: in how many parts a batch goes through the LLM, as the GPU's memory asks for.
        best: ``step``, ``loss`` and ``projector`` (its weights) of the lowest loss on valid so far.
        warm: the warm start; None if there is none.
    """

    projector: Projector
    optimiser: torch.optim.Optimizer
    warm: WarmStart | None = None
    step: int = 0
    parts: int = 1
    best: dict[str, Any] | None = None


def train_projector(
    llm: SpeechLLM,
    encoder: SpeechEncoder,
    train: TranscribedSpeech,
    valid: TranscribedSpeech | None,
    settings: ProjectorSettings,
    output: Path,
    described: Mapping[str, Any],
    stop: StopSignal,
) -> dict[str, Any] | None:
    """Train and write ``output``/{projector.safetensors, config.yaml, train.log}, which appear together at the end.

    The work happens in ``output`` + ``.partial``; a run that was stopped or killed goes on from its checkpoint there,
    to the same result.

    Args:
        described: models and data with their hashes, for config.yaml and to tell whether a run may be continued.

    Returns:
        Losses and word error rate at the end; None when a signal stopped the run.

    Raises:
        UserError: the loss is NaN or infinite (naming the batch), a transcript or media file is missing, or the
            checkpoint was made with other settings.
    """
    # --- set up -------------------------------------------------------------------------------------------------------
    partial = partial_folder(output)
    partial.mkdir(parents=True, exist_ok=True)
    log_to(partial / "train.log")
    state = new_state(llm, encoder, train, settings)
    projector, optimiser = state.projector, state.optimiser
    checked = spread(valid.utterances, settings.valid_utterances) if valid else []

    # --- resume -------------------------------------------------------------------------------------------------------
    identity = identity_of(described, settings)
    saved = load_checkpoint(partial / CHECKPOINT, identity, FREE_TO_CHANGE, _ELSEWHERE)
    if saved is not None:
        state.load_state_dict(saved)
        log.info("resuming after step %d", state.step)
    train.fill_cache(train.utterances)
    if valid:
        valid.fill_cache(checked)
    size = sum(p.numel() for p in projector.parameters())
    log.info("%d utterances, %d parameters, %d steps", len(train.utterances), size, settings.steps)
    save = functools.partial(save_state, partial, state, identity)

    # --- train --------------------------------------------------------------------------------------------------------
    if settings.ctc_steps and not warm_start(state, llm, train, valid, checked, settings, save, stop):
        return None
    shown = Shown(settings.steps, state.step)
    for batch, waves in read_ahead(list(remaining_batches(train.utterances, settings, state.step)), train.read):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(state.step, settings)
        loss, tokens = add_gradients(state, llm, train, batch, waves)
        if not math.isfinite(loss):
            raise UserError(f"projector training: loss {loss} at step {state.step + 1}; the batch: {' '.join(batch)}")
        if settings.clip:
            nn.utils.clip_grad_norm_(projector.parameters(), settings.clip)
        optimiser.step()
        state.step += 1
        last, measured = state.step == settings.steps, state.step % settings.valid_interval == 0
        shown.add(state.step, loss, tokens, now=measured or last)
        if valid and (measured or last):
            keep_if_best(state, validate(projector, llm, valid, checked))
        if stop.raised or last or state.step % settings.checkpoint_interval == 0:
            save()
        if stop.raised and not last:
            log.info("stopped by a signal at step %d; run the same command again to go on", state.step)
            return None

    # --- end ----------------------------------------------------------------------------------------------------------
    result: dict[str, Any] = {"steps": settings.steps}
    if valid:
        result.update(measure_best(state, llm, valid, checked, settings))
    save_projector(partial / FILE_NAME, projector, train.utterances)
    publish(partial, output, {**identity, "versions": installed_versions(), "result": result})
    return result


def identity_of(described: Mapping[str, Any], settings: ProjectorSettings) -> dict[str, Any]:
    """All that decides the result."""
    return {"valid_data_dir": None, "valid_data_hash": None, **described, **asdict(settings)}


def is_finished(output: Path, described: Mapping[str, Any], settings: ProjectorSettings) -> bool:
    """Whether ``output`` is what :func:`train_projector` would write."""
    found = read_yaml(output / "config.yaml") if (output / FILE_NAME).is_file() else {}
    identity = identity_of(described, settings)
    same = found.keys() - {"versions", "result"} == identity.keys()
    return same and all(found[name] == value for name, value in identity.items() if name not in FREE_TO_CHANGE)


def new_state(
    llm: SpeechLLM, encoder: SpeechEncoder, train: TranscribedSpeech, settings: ProjectorSettings
) -> ProjectorState:
    """A run before its first step."""
    torch.manual_seed(settings.seed)
    tokens = tokens_of(llm, train) if settings.ctc_steps else []
    vocabulary = Vocabulary(llm.embed(tokens).detach().float()) if tokens else None
    projector = Projector(encoder.dim, llm.dim, settings.k, settings.hidden, vocabulary).to(llm.device)
    optimiser = torch.optim.AdamW(
        projector.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    state = ProjectorState(projector, optimiser)
    if settings.ctc_steps:
        warm_optimiser = torch.optim.AdamW(projector.parameters(), betas=(0.9, 0.98))
        state.warm = WarmStart(tokens, Normaliser(encoder.dim).to(llm.device), warm_optimiser)
    return state


def save_state(partial: Path, state: ProjectorState, identity: Mapping[str, Any]) -> None:
    save_checkpoint(partial / CHECKPOINT, state.state_dict(), identity)


def partial_folder(output: Path) -> Path:
    """Where the work happens until ``output`` is whole."""
    return output.with_name(output.name + ".partial")


def remaining_batches(utterances: Sequence[str], settings: ProjectorSettings, start: int) -> Iterator[list[str]]:
    """The batches of the steps from ``start`` (0 is the first) to the end."""
    per_epoch = math.ceil(len(utterances) / settings.batch_size)
    for step in range(start, settings.steps):
        epoch, index = divmod(step, per_epoch)
        if index == 0 or step == start:
            batches = epoch_batches(utterances, settings.batch_size, settings.seed, epoch)
        yield batches[index]


def learning_rate(step: int, settings: ProjectorSettings) -> float:
    """Linear warm-up, then linear decay to zero at the last step; ``step`` counts from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    left = max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * max(0.0, (settings.steps - step) / left)


# ----------------------------------------------------------------------------------------------------------- warm start


@dataclass
class WarmStart(SavedState):
    """The warm start between two of its ``step``\\ s.

    Attributes:
        tokens: ids of those in the projector's vocabulary.
    """

    tokens: list[int]
    frames: Normaliser
    optimiser: torch.optim.Optimizer
    step: int = 0


def tokens_of(llm: SpeechLLM, train: TranscribedSpeech) -> list[int]:
    """Ids of the tokens of the train transcripts.

    Raises:
        UserError: there are none.
    """
    tokens = sorted({i for text in train.texts.values() for i in llm.answer_ids(text)})
    if not tokens:
        raise UserError(f"{train.data.path}/text: no transcript has a word, so that there is nothing to learn")
    return tokens


def warm_start(
    state: ProjectorState,
    llm: SpeechLLM,
    train: TranscribedSpeech,
    valid: TranscribedSpeech | None,
    checked: Sequence[str],
    settings: ProjectorSettings,
    save: Callable[[], None],
    stop: StopSignal,
) -> bool:
    """Let each projected frame be like the embedding of a token of the transcript: CTC (Graves et al., 2006) over the
    LLM's tokens, without the LLM's layers, so that a step costs little.

    Returns:
        Whether all steps are done; False when a signal stopped the run.
    """
    warm, projector = state.warm, state.projector
    assert warm is not None
    number = {token: i for i, token in enumerate(warm.tokens)}
    plan = replace(
        settings, steps=settings.ctc_steps, batch_size=_CTC_BATCH, learning_rate=_CTC_RATE, warmup_steps=_CTC_WARMUP
    )
    if warm.step == 0:
        warm.frames.measure(train)
    shown = Shown(plan.steps, warm.step, "warm start, step")
    for batch, waves in read_ahead(list(remaining_batches(train.utterances, plan, warm.step)), train.read):
        for group in warm.optimiser.param_groups:
            group["lr"] = learning_rate(warm.step, plan)
        answers = [[number[i] for i in llm.answer_ids(train.texts[u])] for u in batch]
        others = random.Random(f"{settings.seed} {warm.step}").sample(range(len(number)), min(_CTC_OTHERS, len(number)))
        loss, tokens = warm_loss(projector, warm.frames(train.frames(batch, waves)), answers, others)
        warm.optimiser.zero_grad(set_to_none=True)
        (loss / max(1, tokens)).backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        warm.optimiser.step()
        warm.step += 1
        last = warm.step == plan.steps
        total = loss.item()
        if not math.isfinite(total):
            raise UserError(
                f"warm start of the projector: loss {total} at step {warm.step}; the batch: {' '.join(batch)}"
            )
        shown.add(warm.step, total, tokens, now=last)
        if last:
            warm.frames.fold(projector)
            log_wer(llm, warm.tokens, projector, valid, checked)
        if stop.raised or last or warm.step % settings.checkpoint_interval == 0:
            save()
        if stop.raised and not last:
            log.info("stopped by a signal at step %d of the warm start; run the same command again", warm.step)
            return False
    return True


def log_wer(
    llm: SpeechLLM, ids: Sequence[int], projector: Projector, valid: TranscribedSpeech | None, checked: Sequence[str]
) -> None:
    """How well the tokens alone, most likely ones at each position, spell the valid set's words."""
    if valid is None or projector.vocabulary is None:
        return
    heard: dict[str, str] = {}
    for batch, waves in read_ahead(valid.batches(checked, _VALID_SECONDS), valid.read):
        rows = positions(projector, valid.frames(batch, waves))
        paths = [projector.vocabulary.best(x) for x in rows]
        heard.update({u: llm.decode([ids[i] for i in path]) for u, path in zip(batch, paths, strict=True)})
    wer = word_error_rate(valid.texts, heard)["wer"]
    if wer is not None:
        log.info("warm start done: WER of its tokens on valid, without the LLM: %.1f%%", 100 * wer)


# ----------------------------------------------------------------------------------------------------------------- loss


def answer_tokens(llm: SpeechLLM, texts: Mapping[str, str], batch: Sequence[str]) -> list[list[int]]:
    """Token ids of the transcripts, EOS included."""
    eos = llm.tokenizer.eos_token_id
    return [[*llm.answer_ids(texts[u]), eos if eos is not None else llm.eos_ids[0]] for u in batch]


def answer_loss(llm: SpeechLLM, contexts: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> Tensor:
    """Summed cross entropy of ``answers`` (token ids, EOS included) behind ``contexts`` (P_i, D).

    Raises:
        UserError: the LLM cannot read so many positions.
    """
    for context, answer in zip(contexts, answers, strict=True):
        llm.check_room([context], len(answer))
    rows = [torch.cat([c, llm.embed(a).to(c)]) for c, a in zip(contexts, answers, strict=True)]
    longest, most = max(map(len, rows)), max(map(len, answers))
    # Left padding, as in simulation; all answers then end in the last column, and only `most` logits are needed.
    embeds = torch.stack([nn.functional.pad(r, (0, 0, longest - len(r), 0)) for r in rows])
    lengths = torch.tensor([len(r) for r in rows], device=embeds.device)
    mask = torch.arange(longest, device=embeds.device)[None] >= longest - lengths[:, None]
    # Some models of transformers 4 give all logits all the same.
    logits = llm.model(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        position_ids=prompt_positions(mask),
        use_cache=False,
        logits_to_keep=most + 1,
    ).logits[:, -most - 1 : -1]
    targets = torch.full((len(rows), most), -100, dtype=torch.long)
    for row, answer in zip(targets, answers, strict=True):
        row[most - len(answer) :] = torch.tensor(list(answer))
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten().to(logits.device), ignore_index=-100, reduction="sum"
    )


def add_gradients(
    state: ProjectorState,
    llm: SpeechLLM,
    train: TranscribedSpeech,
    batch: Sequence[str],
    waves: Mapping[str, np.ndarray],
) -> tuple[float, int]:
    """The gradients of a batch's mean loss over its tokens, in as many parts as memory asks for.

    Where memory runs out on the GPU, the batch is begun again in twice as many parts, and later batches keep to that;
    the gradients are the same.

    Returns:
        The summed loss, and the number of tokens.

    Raises:
        UserError: memory does not suffice for a single utterance.
    """
    answers = answer_tokens(llm, train.texts, batch)
    tokens = sum(map(len, answers))
    while True:
        state.optimiser.zero_grad(set_to_none=True)
        size, total = -(-len(batch) // state.parts), 0.0
        loss: Any
        contexts: Any
        try:
            for start in range(0, len(batch), size):
                part = slice(start, start + size)
                contexts = llm.contexts(project(state.projector, train.frames(batch[part], waves)))
                loss = answer_loss(llm, contexts, answers[part])
                total += loss.item()
                (loss / tokens).backward()
            return total, tokens
        except torch.cuda.OutOfMemoryError as e:
            message = str(e).splitlines()[0]
        # Outside the handler: the exception would keep the failed pass's tensors alive.
        loss = contexts = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1:
            raise UserError(
                f"projector training: one utterance alone does not fit into the GPU's memory ({message}); use --dtype "
                f"bf16 or a larger GPU. The batch: {' '.join(batch)}"
            )
        state.parts *= 2
        smaller = -(-len(batch) // state.parts)
        log.warning("out of GPU memory with %d utterances; going on with parts of %d", size, smaller)


# ----------------------------------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(
    projector: Projector,
    llm: SpeechLLM,
    valid: TranscribedSpeech,
    utterances: Sequence[str],
    transcribed: Sequence[str] = (),
    max_new_tokens: int = 0,
) -> dict[str, Any]:
    """Loss per token on ``utterances`` and, where some are to be ``transcribed``, their word error rate (beam 4)."""
    total, tokens = 0.0, 0
    hypotheses: dict[str, str] = {}
    for batch, waves in read_ahead(valid.batches(utterances, _VALID_SECONDS), valid.read):

        def measure(part: Sequence[str], waves=waves) -> list[tuple[float, int]]:
            contexts = llm.contexts(project(projector, valid.frames(part, waves)))
            answers = answer_tokens(llm, valid.texts, part)
            loss = float(answer_loss(llm, contexts, answers))
            if chosen := [i for i, u in enumerate(part) if u in transcribed]:
                written = llm.transcribe([contexts[i] for i in chosen], max_new_tokens=max_new_tokens)
                hypotheses.update({part[i]: w.text for i, w in zip(chosen, written, strict=True)})
            return [(loss, sum(map(len, answers)))]

        for loss, count in halve_when_out_of_memory(batch, measure):
            total, tokens = total + loss, tokens + count
    wer = word_error_rate(valid.texts, hypotheses)["wer"] if hypotheses else None
    return {"loss": total / max(tokens, 1), "wer": wer}


def keep_if_best(state: ProjectorState, measured: Mapping[str, Any]) -> None:
    """Keep a copy of the projector's weights if its loss on valid is the lowest so far."""
    log.info("step %d: valid loss %.4f", state.step, measured["loss"])
    if state.best is None or measured["loss"] < state.best["loss"]:
        weights = {name: x.detach().clone() for name, x in state.projector.state_dict().items()}
        state.best = {"step": state.step, "loss": measured["loss"], "projector": weights}


def measure_best(
    state: ProjectorState,
    llm: SpeechLLM,
    valid: TranscribedSpeech,
    checked: Sequence[str],
    settings: ProjectorSettings,
) -> dict[str, Any]:
    """Go back to the projector with the lowest loss on valid, and measure it."""
    assert state.best is not None  # the last step is always measured
    state.projector.load_state_dict(state.best["projector"])
    heard = spread(checked, settings.wer_utterances)
    measured = validate(state.projector, llm, valid, checked, heard, settings.max_new_tokens)
    wer = "not measured" if measured["wer"] is None else f"{100 * measured['wer']:.1f}% on {len(heard)} utterances"
    log.info("kept step %d: valid loss %.4f, WER %s", state.best["step"], measured["loss"], wer)
    return {"kept_step": state.best["step"], "valid_loss": measured["loss"], "valid_wer": measured["wer"]}


# ---------------------------------------------------------------------------------------------------- log, final folder


class Shown:
    """A line in the log now and then: the train loss since the last one, and the speed."""

    def __init__(self, steps: int, done: int, what: str = "step"):
        self.steps, self.first, self.what = steps, done, what
        self.begin = self.last = time.monotonic()
        self.loss, self.tokens = 0.0, 0

    def add(self, step: int, loss: float, tokens: int, now: bool) -> None:
        """Count a step; write a line ``now``, or when the last one is old."""
        self.loss, self.tokens = self.loss + loss, self.tokens + tokens
        time_now = time.monotonic()
        if now or time_now - self.last > _LOG_EVERY:
            rate = (step - self.first) / (time_now - self.begin)
            mean, of = self.loss / max(1, self.tokens), self.steps
            log.info("%s %d of %d: train loss %.4f, %.2f steps a second", self.what, step, of, mean, rate)
            self.last, self.loss, self.tokens = time_now, 0.0, 0


def publish(partial: Path, output: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.yaml``, and give the finished folder its final name, without checkpoint and lock, in place of an
    earlier one."""
    write_text(partial / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    (partial / CHECKPOINT).unlink()
    (partial / LOCK).unlink(missing_ok=True)
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)
