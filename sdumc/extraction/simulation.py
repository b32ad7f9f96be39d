"""Simulated text: transcripts by the speech LLM from sound alone, with their states, and what to do when it fails."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sdumc.conditions import NO_SPEECH
from sdumc.data.kaldi_dir import KaldiDir
from sdumc.data.shards import ShardWriter
from sdumc.extraction.activity import lacks_speech
from sdumc.extraction.finishing import BAD_MEDIA
from sdumc.extraction.loop import Output, extract_shard, read_wave
from sdumc.pretrained.llm import SpeechLLM, Transcript
from sdumc.pretrained.quality import LIKELIHOOD, SOUND, judge, normalise, numbers, sketch
from sdumc.pretrained.recogniser import CtcRecogniser, WhisperRecogniser
from sdumc.pretrained.speech import SpeechReader, without_first


@dataclass(frozen=True)
class Search:
    """Settings of decoding: beams, most new tokens, exponent of the length penalty.

    With a ``rescorer``, the hypothesis of the beam is taken whose log-probability is the highest in the weighted mean
    of LLM and recogniser, ``rescore_weight`` being the recogniser's.
    """

    beam: int = 4
    max_new_tokens: int = 200
    length_penalty: float = 1.0
    rescorer: CtcRecogniser | WhisperRecogniser | None = None
    rescore_weight: float = 0.5

    def choose(
        self, waves: Sequence[np.ndarray], texts: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
    ) -> list[int]:
        """The number of the hypothesis of each clip that is taken, from the hypotheses' texts and the LLM's scores."""
        assert self.rescorer is not None
        chosen = []
        for own, heard in zip(scores, self.rescorer.log_probabilities(waves, texts), strict=True):
            joint = (1 - self.rescore_weight) * np.array(own) + self.rescore_weight * np.array(heard)
            # The recogniser may find none possible: then the LLM's best, which is the first, stays.
            chosen.append(int(np.argmax(joint)) if np.isfinite(joint).any() else 0)
        return chosen


@dataclass
class Simulated:
    """Simulated text of one utterance.

    ``states`` (N, D) float32; ``text`` is the transcript that the states belong to, ``raw`` what the LLM wrote;
    ``fallback`` is one of none, asr, cut, prompt. ``log_probability`` says how sure its writer was of
    ``raw``: the mean over the tokens; None where nothing was written, or it is not known. ``sound`` says what the
    encoder heard (:func:`sdumc.pretrained.quality.sketch`); None where the LLM was not asked.
    """

    states: Tensor
    text: str
    raw: str
    status: str
    fallback: str
    log_probability: float | None = None
    sound: np.ndarray | None = None


def simulate(
    reader: SpeechReader,
    waves: Sequence[np.ndarray],
    asr_texts: Sequence[str | None],
    search: Search,
    keep_first: bool = False,
    no_speech: Sequence[bool] = (),
    speech_test: str = "level",
) -> list[Simulated]:
    """Simulated text for a batch of clips.

    An LLM writes an opinion for a clip without speech too. It is not asked where ``speech_test``
    (:func:`sdumc.extraction.activity.lacks_speech`) finds no speech, nor where ``no_speech`` says that the recogniser
    found none: the status is ``no-speech``, and the state that at the prompt's end (``prompt``).

    When the LLM refuses or says nothing, its answer is replaced by the ASR transcript, read behind the same sound and
    prompt (fallback ``asr``), or, without one, by the single state at the prompt's end (``prompt``). An endless repeat
    is cut where it begins (``cut``).
    """
    mute = [i for i, wave in enumerate(waves) if (no_speech and no_speech[i]) or lacks_speech(wave, speech_test)]
    heard = [i for i in range(len(waves)) if i not in mute]
    results: dict[int, Simulated] = {}
    if heard:
        texts = [asr_texts[i] for i in heard]
        results.update(
            zip(heard, _transcribe(reader, [waves[i] for i in heard], texts, search, keep_first), strict=True)
        )
    if mute:
        contexts = reader.contexts([waves[i] for i in mute])
        for i, states in zip(mute, reader.llm.encode(contexts, [[] for _ in mute]), strict=True):
            results[i] = Simulated(states[:1], "", "", NO_SPEECH, "prompt")
    return [results[i] for i in range(len(waves))]


def _transcribe(
    reader: SpeechReader,
    waves: Sequence[np.ndarray],
    asr_texts: Sequence[str | None],
    search: Search,
    keep_first: bool,
) -> list[Simulated]:
    """What :func:`simulate` does with clips in which there may be speech."""
    llm = reader.llm
    frames = reader.encoder(waves)
    contexts = reader.contexts_of(frames)
    choose = functools.partial(search.choose, waves) if search.rescorer is not None else None
    written = llm.transcribe(contexts, search.beam, search.max_new_tokens, search.length_penalty, choose)
    verdicts = [judge(t.text, t.tokens, t.ended) for t in written]
    results: list[Simulated | None] = [
        _kept(llm, t, status, kept, keep_first) if status not in ("empty", "refusal") else None
        for t, (status, kept) in zip(written, verdicts, strict=True)
    ]
    failed = [i for i, r in enumerate(results) if r is None]
    with_asr = [i for i in failed if asr_texts[i] and normalise(asr_texts[i] or "")]
    if with_asr:
        answers = [llm.answer_ids(asr_texts[i] or "") for i in with_asr]
        for i, states in zip(with_asr, llm.encode([contexts[i] for i in with_asr], answers), strict=True):
            results[i] = Simulated(
                without_first(states, keep_first),
                asr_texts[i] or "",
                written[i].text,
                verdicts[i][0],
                "asr",
                written[i].log_probability,
            )
    for i in failed:
        if results[i] is None:
            t = written[i]
            results[i] = Simulated(t.states[:1], "", t.text, verdicts[i][0], "prompt", t.log_probability)
    found = [r for r in results if r is not None]
    for result, heard in zip(found, frames, strict=True):
        result.sound = sketch(heard.float().mean(0).cpu().numpy())
    return found


def _kept(llm: SpeechLLM, written: Transcript, status: str, kept: int, keep_first: bool) -> Simulated:
    sure = written.log_probability
    if status != "repeat":
        return Simulated(without_first(written.states, keep_first), written.text, written.text, status, "none", sure)
    states = without_first(written.states[: kept + 1], keep_first)
    return Simulated(states, llm.decode(written.tokens[:kept]), written.text, status, "cut", sure)


def extract_simulated_text(
    data: KaldiDir,
    batches: Sequence[list[str]],
    reader: SpeechReader,
    writer: ShardWriter,
    asr_texts: Mapping[str, str],
    search: Search,
    keep_first: bool = False,
    bad_media: str = "stop",
    no_speech: Collection[str] = (),
    speech_test: str = "level",
) -> None:
    """Simulate the text of the utterances in ``batches``: :func:`sdumc.extraction.loop.extract_shard`.

    Args:
        asr_texts: transcripts that take the place of refusals and empty answers.
        no_speech: utterances in which the recogniser found no speech.
        speech_test: how else clips without speech are found.
    """

    def compute(items: Sequence[tuple[str, np.ndarray]]) -> list[Output]:
        replacements = [asr_texts.get(utt) for utt, _ in items]
        mute = [utt in no_speech for utt, _ in items]
        own = reader.of(items[0][0])  # a batch is for one of them
        results = simulate(own, [wave for _, wave in items], replacements, search, keep_first, mute, speech_test)
        return [Output(r.states.cpu().numpy(), notes=_notes(r)) for r in results]

    def unheard(reason: str) -> Output:
        return Output(
            absent=reason, notes={"hyp": "", "raw": "", "status": "empty", "fallback": "absent", BAD_MEDIA: reason}
        )

    extract_shard(batches, writer, lambda utt: read_wave(data, utt), compute, bad_media, unheard)


def _notes(r: Simulated) -> dict[str, str]:
    notes = {"hyp": r.text, "raw": r.raw, "status": r.status, "fallback": r.fallback}
    if r.log_probability is not None:
        notes[LIKELIHOOD] = f"{r.log_probability:.3f}"
    if r.sound is not None:
        notes[SOUND] = numbers(r.sound)
    return notes
