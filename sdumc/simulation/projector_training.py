"""Training the projector: everything else frozen, cross entropy on transcripts through the LLM.

A step's input is laid out exactly as in simulation, ``[audio embeddings][BOS]"USER: {prompt}\\n ASSISTANT:"``, followed
by the transcript and EOS, on which alone the loss is taken.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from sdumc.data.kaldi_dir import KaldiDir
from sdumc.errors import UserError
from sdumc.extraction.batches import make_batches
from sdumc.extraction.loop import read_ahead, read_wave
from sdumc.files import atomic_write, write_text
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.memory import halve_when_out_of_memory
from sdumc.pretrained.projector import FILE_NAME, Projector, project, save_projector
from sdumc.pretrained.quality import word_error_rate
from sdumc.pretrained.speech_encoder import SpeechEncoder
from sdumc.versions import installed_versions

log = logging.getLogger("sdumc")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a run; everything that decides its result, besides models and data.

    ``learning_rate`` is reached after ``warmup_steps`` and falls linearly to zero at ``steps``. ``cache_mb`` bounds the
    encoder outputs kept in memory; what does not fit is encoded anew each time.
    """

    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.0
    clip: float = 1.0
    k: int = 5
    hidden: int = 2048
    seed: int = 1
    valid_interval: int = 200
    valid_utterances: int = 500
    wer_utterances: int = 50
    max_new_tokens: int = 200
    checkpoint_interval: int = 500
    cache_mb: int = 1024


class Corpus:
    """Utterances with sound and transcript; encoder outputs are kept while there is room."""

    def __init__(self, data: KaldiDir, texts: Mapping[str, str], encoder: SpeechEncoder, cache_bytes: int):
        missing = [u for u in data.utterances if u not in texts]
        if missing:
            raise UserError(f"{data.path}: training a projector needs transcripts; {missing[0]!r} has none in text")
        self.data, self.texts, self.encoder = data, texts, encoder
        self.room = cache_bytes
        self._kept: dict[str, Tensor] = {}

    def fill(self, utterances: Sequence[str]) -> None:
        """Encode ``utterances``, in fixed batches of similar length, until the cache is full.

        What is kept, and its last bits, then do not depend on where a resumed run begins.
        """
        seconds = {u: self.data.utt2dur.get(u, 0.0) for u in utterances}
        batches = make_batches(seconds, 16, 200.0)
        for batch, waves in read_ahead(batches, lambda b: [read_wave(self.data, u) for u in b]):
            for utt, frames in zip(batch, self.encoder(waves), strict=True):
                size = frames.numel() * frames.element_size()
                if size > self.room:
                    log.info("%s: %d of %d clips kept in memory", self.data.path, len(self._kept), len(seconds))
                    return
                self.room -= size
                self._kept[utt] = frames.cpu()

    def read(self, batch: Sequence[str]) -> dict[str, np.ndarray]:
        """The sound of those utterances whose frames are not kept (called in a thread ahead of time)."""
        return {u: read_wave(self.data, u) for u in batch if u not in self._kept}

    def frames(self, batch: Sequence[str], waves: Mapping[str, np.ndarray]) -> list[Tensor]:
        """Encoder frames (T_i, D) of a batch."""
        todo = [u for u in batch if u not in self._kept]
        fresh = dict(zip(todo, self.encoder([waves[u] for u in todo]) if todo else [], strict=True))
        return [fresh[u] if u in fresh else self._kept[u].to(self.encoder.device) for u in batch]


def answer_loss(llm: SpeechLLM, contexts: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    """Summed cross entropy of ``answers`` (token ids, EOS included) behind ``contexts`` (P_i, D), and their number."""
    rows = [torch.cat([c, llm.embed(a).to(c)]) for c, a in zip(contexts, answers, strict=True)]
    longest, most = max(map(len, rows)), max(map(len, answers))
    # Left padding, as in simulation; all answers then end in the last column, and only `most` logits are needed.
    embeds = torch.stack([nn.functional.pad(r, (0, 0, longest - len(r), 0)) for r in rows])
    lengths = torch.tensor([len(r) for r in rows], device=embeds.device)
    mask = torch.arange(longest, device=embeds.device)[None] >= longest - lengths[:, None]
    logits = llm.model(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=most + 1,
    ).logits[:, :-1]
    targets = torch.full((len(rows), most), -100, dtype=torch.long)
    for row, answer in zip(targets, answers, strict=True):
        row[most - len(answer) :] = torch.tensor(list(answer))
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten().to(logits.device), ignore_index=-100, reduction="sum"
    )
    return loss, sum(map(len, answers))


def epoch_batches(utterances: Sequence[str], batch_size: int, seed: int, epoch: int) -> list[list[str]]:
    """Shuffled batches of an epoch, the same for the same seed; a short last batch is kept."""
    order = sorted(utterances)
    random.Random(f"{seed} {epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _schedule(utterances: Sequence[str], settings: TrainingSettings, start: int) -> Iterator[list[str]]:
    """The batches of steps ``start`` to the end."""
    per_epoch = math.ceil(len(utterances) / settings.batch_size)
    for step in range(start, settings.steps):
        epoch, index = divmod(step, per_epoch)
        if index == 0 or step == start:
            batches = epoch_batches(utterances, settings.batch_size, settings.seed, epoch)
        yield batches[index]


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then linear decay to zero at the last step; ``step`` counts from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    left = max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * max(0.0, (settings.steps - step) / left)


def _answers(llm: SpeechLLM, texts: Mapping[str, str], batch: Sequence[str]) -> list[list[int]]:
    eos = llm.tokenizer.eos_token_id
    return [[*llm.answer_ids(texts[u]), eos if eos is not None else llm.eos_ids[0]] for u in batch]


@torch.no_grad()
def validate(
    projector: Projector, llm: SpeechLLM, corpus: Corpus, utterances: Sequence[str], wer_on: Sequence[str], limit: int
) -> dict[str, Any]:
    """Loss per token on ``utterances`` and word error rate (beam 4) on ``wer_on``."""
    total, tokens, hypotheses = 0.0, 0, {}
    seconds = {u: corpus.data.utt2dur.get(u, 0.0) for u in utterances}
    for batch, waves in read_ahead(make_batches(seconds, 16, 400.0), corpus.read):

        def work(part: Sequence[str], waves=waves) -> list[tuple[float, int]]:
            contexts = llm.contexts(project(projector, corpus.frames(part, waves)))
            loss, count = answer_loss(llm, contexts, _answers(llm, corpus.texts, part))
            chosen = [i for i, u in enumerate(part) if u in set(wer_on)]
            if chosen:
                written = llm.transcribe([contexts[i] for i in chosen], max_new_tokens=limit)
                hypotheses.update({part[i]: w.text for i, w in zip(chosen, written, strict=True)})
            return [(float(loss), count)]

        for loss, count in halve_when_out_of_memory(batch, work):
            total, tokens = total + loss, tokens + count
    wer = word_error_rate(corpus.texts, hypotheses)["wer"] if hypotheses else None
    return {"loss": total / max(tokens, 1), "wer": wer, "utterances": len(utterances)}


def train_projector(
    llm: SpeechLLM,
    encoder: SpeechEncoder,
    train: Corpus,
    valid: Corpus | None,
    settings: TrainingSettings,
    output: str | Path,
    described: Mapping[str, Any],
) -> dict[str, Any]:
    """Train and write ``output``/{projector.safetensors, config.yaml, train.log}, which appear together at the end.

    The work happens in ``output`` + ``.partial``; a run that was killed goes on from its last checkpoint there, to the
    same result, if models, data and settings are unchanged.

    Args:
        described: everything of the command line, for config.yaml and to tell whether a partial run may be continued.

    Returns:
        Losses and word error rate at the end.

    Raises:
        UserError: the loss is NaN or infinite (naming the batch), or a transcript or media file is missing.
    """
    output = Path(output)
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(partial / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    try:
        result = _train(llm, encoder, train, valid, settings, partial, described)
    finally:
        log.removeHandler(handler)
        handler.close()
    write_text(
        partial / "config.yaml",
        yaml.safe_dump(
            {**described, **asdict(settings), "versions": installed_versions(), "result": result},
            sort_keys=False,
            allow_unicode=True,
        ),
    )
    (partial / "checkpoint.pt").unlink(missing_ok=True)
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)
    return result


def _train(
    llm: SpeechLLM,
    encoder: SpeechEncoder,
    train: Corpus,
    valid: Corpus | None,
    settings: TrainingSettings,
    partial: Path,
    described: Mapping[str, Any],
) -> dict[str, Any]:
    torch.manual_seed(settings.seed)
    projector = Projector(encoder.dim, llm.dim, settings.k, settings.hidden).to(llm.device)
    optimiser = torch.optim.AdamW(
        projector.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    identity = repr(sorted({**described, **asdict(settings)}.items(), key=lambda i: i[0]))
    start, best = _restore(partial / "checkpoint.pt", identity, projector, optimiser)
    utterances = train.data.utterances
    checked = _spread(valid.data.utterances, settings.valid_utterances) if valid else []
    heard = _spread(checked, settings.wer_utterances)
    train.fill(utterances)
    if valid:
        valid.fill(checked)
    log.info(
        "%d utterances, %d parameters, steps %d to %d",
        len(utterances),
        sum(p.numel() for p in projector.parameters()),
        start + 1,
        settings.steps,
    )
    begin, shown, tokens, running, parts = time.monotonic(), time.monotonic(), 0, 0.0, 1
    for step, (batch, waves) in enumerate(read_ahead(list(_schedule(utterances, settings, start)), train.read), start):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, settings)
        count = sum(map(len, _answers(llm, train.texts, batch)))
        value, parts = _add_gradients(projector, llm, train, batch, waves, count, optimiser, parts)
        if not math.isfinite(value):
            raise UserError(f"projector training: loss {value} at step {step + 1}; the batch: {' '.join(batch)}")
        nn.utils.clip_grad_norm_(projector.parameters(), settings.clip)
        optimiser.step()
        running, tokens = running + value, tokens + count
        last = step + 1 == settings.steps
        if last or time.monotonic() - shown > 20 or (step + 1) % settings.valid_interval == 0:
            rate = (step + 1 - start) / (time.monotonic() - begin)
            log.info(
                "step %d of %d: train loss %.4f, %.2f steps a second", step + 1, settings.steps, running / tokens, rate
            )
            shown, tokens, running = time.monotonic(), 0, 0.0
        if valid and ((step + 1) % settings.valid_interval == 0 or last):
            report = validate(projector, llm, valid, checked, heard if last else [], settings.max_new_tokens)
            log.info("step %d: valid loss %.4f", step + 1, report["loss"])
            if best is None or report["loss"] < best["loss"]:
                best = {"step": step + 1, "loss": report["loss"]}
                save_projector(partial / FILE_NAME, projector)
        if (step + 1) % settings.checkpoint_interval == 0 and not last:
            state = {
                "identity": identity,
                "step": step + 1,
                "best": best,
                "projector": projector.state_dict(),
                "optimiser": optimiser.state_dict(),
            }
            with atomic_write(partial / "checkpoint.pt", "wb") as f:
                torch.save(state, f)
    if not valid:
        save_projector(partial / FILE_NAME, projector)
        return {"steps": settings.steps}
    return _final(projector, llm, valid, checked, heard, settings, partial, best)


def _add_gradients(
    projector: Projector,
    llm: SpeechLLM,
    train: Corpus,
    batch: Sequence[str],
    waves: Mapping[str, np.ndarray],
    count: int,
    optimiser: torch.optim.Optimizer,
    parts: int,
) -> tuple[float, int]:
    """Gradients of a batch's mean loss over its ``count`` tokens, made in so many parts as memory asks for.

    Where memory runs out on the GPU, all is begun again in twice as many parts, and later batches keep to that: the
    gradients are the same.

    Returns:
        The summed loss, and the number of parts.

    Raises:
        UserError: memory does not suffice for a single utterance.
    """
    while True:
        optimiser.zero_grad(set_to_none=True)
        size, total = -(-len(batch) // parts), 0.0
        loss: Any
        contexts: Any
        try:
            for start in range(0, len(batch), size):
                part = batch[start : start + size]
                contexts = llm.contexts(project(projector, train.frames(part, waves)))
                loss, _ = answer_loss(llm, contexts, _answers(llm, train.texts, part))
                total += loss.item()
                (loss / count).backward()
            return total, parts
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
        parts *= 2
        log.warning("out of GPU memory with %d utterances; going on with parts of %d", size, -(-len(batch) // parts))


def _final(projector, llm, valid, checked, heard, settings, partial, best) -> dict[str, Any]:
    """Measure the projector that was kept: the one with the lowest loss on valid."""
    from safetensors.torch import load_file

    prefix = "encoder_projector."
    kept = {k.removeprefix(prefix): v for k, v in load_file(str(partial / FILE_NAME)).items()}
    projector.load_state_dict(kept)
    report = validate(projector, llm, valid, checked, heard, settings.max_new_tokens)
    wer = "not measured" if report["wer"] is None else f"{100 * report['wer']:.1f}% on {len(heard)} utterances"
    log.info("kept step %d: valid loss %.4f, WER %s", best["step"], report["loss"], wer)
    return {
        "steps": settings.steps,
        "kept_step": best["step"],
        "valid_loss": report["loss"],
        "valid_wer": report["wer"],
    }


def _restore(path: Path, identity: str, projector: Projector, optimiser) -> tuple[int, dict | None]:
    if not path.is_file():
        return 0, None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged: start over
        log.warning("%s: cannot be read; starting anew", path)
        return 0, None
    if state["identity"] != identity:
        log.info("%s: made with other settings; starting anew", path)
        return 0, None
    projector.load_state_dict(state["projector"])
    optimiser.load_state_dict(state["optimiser"])
    log.info("%s: continuing after step %d", path, state["step"])
    return state["step"], state["best"]


def _spread(utterances: Sequence[str], count: int) -> list[str]:
    """At most ``count`` utterances, evenly from the sorted list."""
    utterances = sorted(utterances)
    if len(utterances) <= count:
        return list(utterances)
    return [utterances[i * len(utterances) // count] for i in range(count)]
