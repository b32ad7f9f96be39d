"""Score a video or audio file: find its utterances, extract features, simulate text, run the trained network.

Scores for people are an aligned table, and subtitles.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdumc.conditions import MISSING_TEXTS, MODALITIES, TEXTS, condition_of, modality
from sdumc.data.batches import Utterance, collate
from sdumc.data.media import probe, read_sound
from sdumc.data.tables import MediaInfo, MediaSpan, PastEnd
from sdumc.errors import UserError
from sdumc.extraction.activity import RATE, cut_speech, even_pieces, is_silent
from sdumc.extraction.loop import make_batches
from sdumc.files import shown, write_text
from sdumc.machine import pick_device
from sdumc.model.network import SDUMC
from sdumc.prediction.extractors import Extractors, load_record
from sdumc.prediction.inputs import Cue, format_subtitles, sentences
from sdumc.prediction.package import open_experiment
from sdumc.scale import CMU, LabelScale, scale_of
from sdumc.scoring.decoding import run_batch
from sdumc.training.checkpoint import load_model
from sdumc.training.settings import load_config

log = logging.getLogger("sdumc")

MAX_SECONDS = 20.0  # a longer file is cut into utterances: models are trained on clips of a sentence
_TEXT_KINDS = {"text": "real", "text_sim": "simulated", "text_asr": "asr"}  # by feature, as in the output
_FEW_PICTURES = 0.3  # seconds: an utterance that has fewer pictures is scored without
_ONE_PICTURE = 0.1  # seconds; a photograph is opened as a video of one frame


@dataclass(frozen=True)
class ScoredUtterance:
    """One utterance: its place in the file (seconds), its score, and what the score was computed from.

    ``modalities`` are those of audio, text and video that the utterance has. ``text`` is "simulated", "asr", "real" or
    None, and ``transcript`` is the simulated, recognised or given text. ``status`` is the result of simulation or
    recognition, one of :data:`sdumc.conditions.TEXT_STATUSES`. ``log_probability`` is the mean over the tokens of
    simulated or recognised text; ``unlikely`` where it is below that of 99% of the train set's transcripts;
    ``strange_sound`` where simulated text comes from sound that is farther from the train set's than 99% of its clips.

    ``attention`` has, by modality, the attention of the seven queries over the frames (7, T); ``tokens`` the places in
    ``transcript`` of the T tokens of text, empty where they are not known.
    """

    start: float
    end: float
    score: float
    transcript: str
    modalities: tuple[str, ...]
    text: str | None
    status: str | None = None
    attention: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    tokens: list[tuple[int, int]] = field(default_factory=list, repr=False, compare=False)
    log_probability: float | None = None
    unlikely: bool = False
    strange_sound: bool = False


@dataclass(frozen=True)
class ScoredFile:
    """A file's utterances in time order and their mean score weighted by duration, ``overall``.

    ``notes`` report what was unusual: a silent sound track, a part without a face, ... ``scale`` is the lowest and the
    highest label of the model's corpus.
    """

    file: str
    duration: float
    overall: float
    utterances: list[ScoredUtterance]
    notes: list[str] = field(default_factory=list)
    scale: tuple[float, float] = (-3.0, 3.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without attention and tokens."""
        utterances = [replace(u, attention={}, tokens=[]) for u in self.utterances]
        values = asdict(replace(self, utterances=utterances))
        for u in values["utterances"]:
            del u["attention"], u["tokens"]
        return {**values, "file": shown(self.file)}


def overall_score(utterances: Sequence[ScoredUtterance]) -> float:
    """Mean score weighted by duration: sum of (end - start) * score over the sum of (end - start)."""
    seconds = [u.end - u.start for u in utterances]
    if not sum(seconds):  # the file does not state its duration
        return sum(u.score for u in utterances) / len(utterances)
    return sum(s * u.score for s, u in zip(seconds, utterances, strict=True)) / sum(seconds)


@dataclass
class _Part:
    """An utterance while it is being scored: its place, sound and given words, and then its features."""

    start: float
    end: float
    span: MediaSpan
    wave: np.ndarray | None
    words: str | None = None
    features: dict[str, torch.Tensor | None] = field(default_factory=dict)
    transcript: str = ""
    status: str | None = None
    log_probability: float | None = None
    sound: np.ndarray | None = None
    attention: dict[str, np.ndarray] = field(default_factory=dict)


class Scorer:
    """A trained model together with the feature extractors of its recipe; scores single files.

    >>> scorer = Scorer.load("exp/train_seed1")         # or a packed model (sdumc pack)
    >>> print(scorer.score("clip.mp4").overall)
    """

    def __init__(
        self,
        model: SDUMC,
        extractors: Extractors,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
        notes: Sequence[str] = (),
        keep: Any = None,
        scale: LabelScale = CMU,
    ):
        self.model, self.extractors, self.device = model, extractors, torch.device(device)
        self.batch_size, self.notes, self.scale = batch_size, list(notes), scale
        if keep is not None:  # an unpacked archive's temporary folder, which is removed with this object
            weakref.finalize(self, keep.cleanup)
        self.missing_text = model.config.missing_text
        self.features = [name for name in extractors.record.features if modality(name) in model.available]

    @classmethod
    def load(
        cls,
        exp_dir: str | Path,
        *,
        checkpoint: str = "valid-best",
        device: str = "auto",
        dtype: str | None = None,
        model_dir: str | Path | None = None,
        batch_size: int = 8,
    ) -> Scorer:
        """Load an exp folder, a packed folder or archive, or a packed model of the hub's cache: ``OWNER/NAME``.

        Args:
            checkpoint: ``valid-best`` or ``averaged``; a packed model has only one.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: number format of the extractors; None: the one with which the train set's features were made.
            model_dir: folder of the pretrained models, if they have been moved.
            batch_size: utterances at once, at most.

        Raises:
            UserError: there is no such experiment, its features were not made by this package, or a pretrained model
                is missing or has other weights than recorded.
        """
        where = pick_device(device)
        folder, keep = open_experiment(Path(exp_dir))
        record = load_record(folder)
        settings = load_config(folder)
        model = load_model(folder, checkpoint).to(where)
        extractors = Extractors(record, where, dtype, Path(model_dir) if model_dir else None)
        extractors.check()
        notes = []
        for m in MODALITIES:
            wanted = MISSING_TEXTS[model.config.missing_text] if m == "text" else m
            if m in model.available and not wanted:
                notes.append(
                    "without --text, scores are made without text, as the model was trained (missing-text: none)"
                )
            elif wanted and m in model.available and wanted not in record.features:
                reason = record.left_out.get(wanted, "the train set had none")
                notes.append(f"scores are made without {TEXTS.get(wanted, wanted)}: {reason}")
        if settings.flows == "complete":
            notes.append("this model was trained with real text only; without --text its scores mean little")
        return cls(
            model, extractors, device=where, batch_size=batch_size, notes=notes, keep=keep, scale=scale_of(folder)
        )

    def score(
        self,
        file: str | Path,
        text: str | Sequence[Cue] | None = None,
        *,
        cut: str = "auto",
        max_seconds: float = MAX_SECONDS,
        bad_media: str = "stop",
        progress: Callable[[int, int], None] | None = None,
    ) -> ScoredFile:
        """Score one video or audio file.

        Args:
            text: the transcript, if it is known: the words of the whole file, or timed cues, which are then the
                utterances. It is read by the model's complete flow. Without it, text is simulated from the sound, or
                recognised, as the model's missing flow was trained.
            cut: ``auto`` cuts a file longer than ``max_seconds`` into utterances, ``yes`` every file, ``no`` none.
            max_seconds: longest utterance when cutting.
            bad_media: when a sound or picture track cannot be read: ``stop`` raises, ``absent`` scores without it.
            progress: called with (utterances done, utterances) after each batch.

        Raises:
            UserError: the file is missing, no media file, damaged, or has nothing that can be scored.
        """
        self._check_request(text, cut, max_seconds)
        path = str(file)
        notes: list[str] = list(getattr(text, "notes", ()))  # of subtitles
        info = _probe(path)
        sees = info.has_video and "video" in self.features
        wave = self._read_sound(path, info, bad_media, notes)
        duration = len(wave) / RATE if wave is not None else info.duration
        if wave is not None and is_silent(wave):
            notes.append("its sound is silence and is not used")
            wave = None
        if wave is None and not sees and text is None:
            raise UserError(f"{shown(path)}: {_why_nothing_is_left(info, 'video' in self.features)}")
        parts = self._divide(path, wave, duration, text, cut, max_seconds, sees, notes)
        results = self._score_parts(parts, max(400.0, max_seconds), info.has_video, bad_media, progress, notes)
        notes += _doubts(results)
        if not results:
            raise UserError(f"{shown(path)}: nothing in it can be scored ({'; '.join(notes)})")
        return ScoredFile(
            path, round(duration, 3), overall_score(results), results, notes, (self.scale.low, self.scale.high)
        )

    # ---- steps of score()

    def _check_request(self, text: str | Sequence[Cue] | None, cut: str, max_seconds: float) -> None:
        if cut not in ("auto", "yes", "no"):
            raise UserError(f"cut must be auto, yes or no, not {cut!r}")
        if max_seconds < 1:
            raise UserError(f"utterances of at most {max_seconds:g} s are too short; at least 1")
        missing = MISSING_TEXTS[self.missing_text]
        if text is None and {modality(f) for f in self.features} == {"text"} and missing not in self.features:
            raise UserError("this model reads nothing but a transcript; give it with --text")
        if text is not None and "text" not in self.features:
            reason = self.extractors.record.left_out.get("text", "its features of real text are not recorded")
            raise UserError(f"this model cannot take a transcript: {reason}")

    def _read_sound(self, path: str, info: MediaInfo, bad_media: str, notes: list[str]) -> np.ndarray | None:
        if not info.has_audio:
            notes.append("has no sound track")
            return None
        try:
            wave, unusual = read_sound(path)
            notes += unusual
            return wave
        except UserError as e:
            if bad_media != "absent" or not info.has_video:
                raise
            notes.append(f"sound taken as absent: {e}")
            return None

    def _divide(
        self,
        path: str,
        wave: np.ndarray | None,
        duration: float,
        text: str | Sequence[Cue] | None,
        cut: str,
        max_seconds: float,
        sees: bool,
        notes: list[str],
    ) -> list[_Part]:
        """The utterances of a file. A file that is not cut is read to its end, as the recipe reads a clip."""
        whole = _Part(0.0, duration, MediaSpan(path), wave)
        if isinstance(text, str):
            whole.words = _words_of_whole_file(text, duration, cut, max_seconds, notes)
            return [whole]
        if text is not None:
            return [_part(path, wave, c.start, c.end, c.text) for c in _cues(path, text, duration, max_seconds)]
        if cut == "no" or (cut == "auto" and duration <= max_seconds):
            return [whole]
        if wave is None:
            return [_part(path, None, a, b) for a, b in even_pieces(duration, max_seconds)]
        if spans := cut_speech(wave, max_seconds):
            return [_part(path, wave, a, b) for a, b in spans]
        if not sees:
            raise UserError(
                f"{shown(path)}: no speech was found in it; --cut no scores it as one utterance all the same"
            )
        notes.append("no speech was found in it: its sound is not used, and it is cut into equal parts")
        return [_part(path, None, a, b) for a, b in even_pieces(duration, max_seconds)]

    def _score_parts(
        self,
        parts: list[_Part],
        batch_seconds: float,
        has_video: bool,
        bad_media: str,
        progress: Callable[[int, int], None] | None,
        notes: list[str],
    ) -> list[ScoredUtterance]:
        """Score utterances in batches; returns those that could be scored, in time order."""
        done = 0
        results: dict[int, ScoredUtterance] = {}
        pictures_not_used: Counter[str] = Counter()  # reason -> number of utterances
        seconds = {str(i): p.end - p.start for i, p in enumerate(parts)}
        for batch in make_batches(seconds, self.batch_size, batch_seconds):
            numbers = [int(b) for b in batch]
            chosen = [parts[i] for i in numbers]
            self._extract(chosen, has_video, bad_media, pictures_not_used)
            for i, scored in zip(numbers, self._predict(chosen), strict=True):
                if scored is None:
                    notes.append(f"{parts[i].start:.2f}-{parts[i].end:.2f} s left out: nothing there to score")
                else:
                    results[i] = scored
                parts[i].features, parts[i].wave = {}, None
            done += len(batch)
            if progress is not None:
                progress(done, len(parts))
        for reason, count in pictures_not_used.items():
            place = f" in {count} of {len(parts)} utterances" if len(parts) > 1 else ""
            notes.append(f"pictures not used{place}: {reason}")
        return [results[i] for i in sorted(results)]

    def _extract(self, parts: list[_Part], has_video: bool, bad_media: str, pictures_not_used: Counter[str]) -> None:
        """Fill in the features of a batch."""
        with_sound = [p for p in parts if p.wave is not None and len(p.wave)]
        waves = [p.wave for p in with_sound if p.wave is not None]
        if with_sound and "audio" in self.features:
            for p, x in zip(with_sound, self.extractors.audio(waves), strict=True):
                p.features["audio"] = x
        with_words = [p for p in parts if p.words is not None]
        if with_words:
            states = self.extractors.real_text([p.words or "" for p in with_words], [p.wave for p in with_words])
            for p, x in zip(with_words, states, strict=True):
                p.features["text"], p.transcript = x, p.words or ""
        elif with_sound and (name := MISSING_TEXTS[self.missing_text]) in self.features:
            make = self.extractors.recognised_text if name == "text_asr" else self.extractors.simulated_text
            for p, s in zip(with_sound, make(waves), strict=True):
                p.features[str(name)], p.transcript, p.status = s.states.float().cpu(), s.text, s.status
                p.log_probability = s.log_probability if s.status != "empty" else None
                p.sound = s.sound if s.status != "empty" else None
        if has_video and "video" in self.features:
            for p in parts:
                try:
                    p.features["video"], reason = self._look(p.span)
                except UserError as e:
                    # When the picture track is damaged at its end, the utterances before are still scored.
                    if bad_media != "absent" and p.span.end is None:
                        raise
                    reason = str(e)
                if reason:
                    pictures_not_used[reason] += 1

    def _look(self, span: MediaSpan) -> tuple[torch.Tensor | None, str]:
        """Video features of what the picture track has of a span; or None and the reason."""
        try:
            return self.extractors.video(span)
        except PastEnd as e:  # the sound goes on longer
            reason = f"they end at {e.end:.2f} s"
            if e.end - span.start < _FEW_PICTURES:
                return None, reason
            return self.extractors.video(replace(span, end=e.end))

    def _predict(self, parts: list[_Part]) -> list[ScoredUtterance | None]:
        condition = condition_of("missing" if parts[0].words is None else "full", self.missing_text)
        usable = [p for p in parts if any(p.features.get(f) is not None for f in condition.inputs.values())]
        scores: dict[int, float] = {}
        if usable:
            names = {n: f for n, f in condition.inputs.items() if any(p.features.get(f) is not None for p in usable)}
            dims = {f: next(x.shape[1] for p in usable if (x := p.features.get(f)) is not None) for f in names.values()}
            batch = collate(
                [
                    Utterance(str(i), math.nan, {f: p.features.get(f) for f in names.values()}, dims)
                    for i, p in enumerate(usable)
                ]
            )
            try:
                with torch.inference_mode():
                    attends = self.model.config.fusion == "umca"
                    output = run_batch(self.model, batch.to(self.device), names, condition.flow, with_attention=attends)
            except ValueError as e:  # the network found a wrong dimension
                raise UserError(
                    f"{self.extractors.record.folder}: model and extractors do not belong together: {e}"
                ) from None
            found = self.scale.from_network(output.prediction)
            scores = {id(p): float(s) for p, s in zip(usable, found, strict=True)}
            for row, p in enumerate(usable if attends else ()):
                for feature in names.values():
                    if (x := p.features.get(feature)) is not None:
                        m = modality(feature)
                        p.attention[m] = output.attention[m][row, :, : len(x)].float().cpu().numpy()
        return [self._scored(p, scores[id(p)]) if id(p) in scores else None for p in parts]

    def _scored(self, part: _Part, score: float) -> ScoredUtterance:
        if not math.isfinite(score):
            raise UserError(f"{part.span}: the score is not a finite number; try --dtype fp32")
        feature = next((name for name in _TEXT_KINDS if name in part.features), None)
        text = _TEXT_KINDS[feature] if feature else None
        kinds = {modality(f) for f, x in part.features.items() if x is not None}
        present = tuple(m for m in MODALITIES if m in kinds)
        tokens = []
        if feature and "text" in part.attention:
            tokens = self.extractors.tokens(feature, part.transcript, part.attention["text"].shape[1])
        places = round(part.start, 3), round(part.end, 3)
        limit, sure = self.extractors.unlikely_below(feature or ""), part.log_probability
        unlikely = limit is not None and sure is not None and sure < limit
        words, status = part.transcript, part.status
        return ScoredUtterance(
            *places,
            score,
            words,
            present,
            text,
            status,
            part.attention,
            tokens,
            log_probability=sure,
            unlikely=unlikely,
            strange_sound=self.extractors.strange_sound(feature or "", part.sound),
        )


def _doubts(scored: Sequence[ScoredUtterance]) -> list[str]:
    """Notes on the utterances whose text is far less likely, or whose sound is farther away, than the train set's."""
    found = (
        ([u for u in scored if u.unlikely], "the text of {} is less likely than that of 99% of the train set's clips"),
        (
            [u for u in scored if u.strange_sound],
            "the sound of {} is less like the train set than that of 99% of its clips",
        ),
    )
    notes = []
    for marked, what in found:
        if marked:
            where = ", ".join(f"{u.start:.2f}-{u.end:.2f} s" for u in marked[:3]) + (", ..." if len(marked) > 3 else "")
            which = f"{len(marked)} of {len(scored)} utterances ({where})" if len(scored) > 1 else "it"
            notes.append(
                f"{what.format(which)}: the text is perhaps not what was said, and the score not to be trusted"
            )
    return notes


def _probe(path: str) -> MediaInfo:
    info = probe(path)
    if not info.has_audio and not info.has_video:
        raise UserError(f"{shown(path)}: has neither sound nor pictures; give a video or audio file")
    if not info.has_audio and info.duration < _ONE_PICTURE:
        raise UserError(f"{shown(path)}: a single picture without sound; give a video or audio file")
    return info


def _part(path: str, wave: np.ndarray | None, start: float, end: float, words: str | None = None) -> _Part:
    """The part of a file between two times in seconds."""
    sound = None if wave is None else wave[round(start * RATE) : round(end * RATE)]
    return _Part(start, end, MediaSpan(path, start, end), sound, words)


def _cues(path: str, text: Sequence[Cue], duration: float, max_seconds: float) -> list[Cue]:
    """Subtitles as utterances within the file's duration."""
    cues = sentences(list(text), max_seconds)
    if not cues or cues[0].start >= duration:
        raise UserError(f"{shown(path)}: lasts {duration:.1f} s, before the first subtitle; is it another video's?")
    return [Cue(c.start, min(c.end, duration), c.text) for c in cues if c.start < duration]


def _words_of_whole_file(text: str, duration: float, cut: str, max_seconds: float, notes: list[str]) -> str:
    if not text.strip():
        raise UserError("the transcript is empty; leave it out to have text simulated")
    if cut == "yes":
        raise UserError("a transcript without times cannot be cut; give subtitles (.srt, .vtt), or --cut no")
    if duration > max_seconds:
        notes.append(f"scored as one utterance of {duration:.0f} s, as its transcript has no times; subtitles have")
    return " ".join(text.split())


def _why_nothing_is_left(info: MediaInfo, model_uses_video: bool) -> str:
    if info.has_video and not model_uses_video:
        return "has nothing to hear, and this model does not look at pictures"
    if info.has_video:
        return "has nothing to hear"
    return "its sound is silence, and it has no pictures; there is nothing to score"


_HEADER = ("start", "end", "score", "audio", "text", "video", "transcript")


def table(scored: ScoredFile) -> str:
    """The utterances of a file in columns, the overall score, and notes."""
    rows = [_row(u, _scale(scored)) for u in scored.utterances]
    rows.append(("", "all", _scale(scored).format(scored.overall), "", "", "", ""))
    widths = [max(len(r[i]) for r in [_HEADER, *rows]) for i in range(len(_HEADER))]
    lines = [f"{shown(scored.file)} ({scored.duration:.1f} s), scores from {_scale(scored).ends}"]
    for row in (_HEADER, *rows):
        numbers = [cell.rjust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        words = [cell.ljust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  " + "  ".join(numbers + words).rstrip())
    return "\n".join([*lines, *(f"  note: {note}" for note in scored.notes)])


def _scale(scored: ScoredFile) -> LabelScale:
    return LabelScale(*scored.scale, scheme="none")


def _row(u: ScoredUtterance, scale: LabelScale) -> tuple[str, ...]:
    audio, video = ("yes" if m in u.modalities else "-" for m in ("audio", "video"))
    # Of simulated and recognised text, what is not as it should be.
    doubts = [u.status] if u.status not in (None, "ok") else []
    doubts += [name for name, found in (("unlikely", u.unlikely), ("strange sound", u.strange_sound)) if found]
    text = (u.text or "-") + (f" ({', '.join(doubts)})" if doubts else "")
    return (f"{u.start:.2f}", f"{u.end:.2f}", scale.format(u.score), audio, text, video, u.transcript)


def subtitles(scored: ScoredFile, kind: str) -> str:
    """An ``srt`` or ``vtt`` file with a cue for each utterance: its score and its transcript."""
    cues = [
        Cue(u.start, u.end, f"[{_scale(scored).format(u.score, 1)}] {u.transcript}".strip()) for u in scored.utterances
    ]
    return format_subtitles(cues, kind)


def write_subtitles(scored: ScoredFile, kind: str, output_dir: Path | None = None) -> Path:
    """Write ``<name>.sdumc.<kind>`` beside the file or into ``output_dir``; players show such a file with the video.

    Raises:
        UserError: it cannot be written there.
    """
    file = Path(scored.file)
    path = (output_dir or file.parent) / f"{file.stem}.sdumc.{kind}"
    try:
        write_text(path, subtitles(scored, kind))
    except OSError as e:
        raise UserError(
            f"{shown(path)}: cannot be written ({e.strerror}); give another place with --output-dir"
        ) from None
    return path
