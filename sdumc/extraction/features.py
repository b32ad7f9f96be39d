"""What stages 2 and 3 compute, each by the loop of :mod:`.loop`: audio, text and video features, and transcripts.

* audio: a hidden layer of a speech encoder.
* transcripts of a recogniser: they become ``data/<set>/text_asr``, the words of the condition ``asr``, and also replace
  the LLM's failures in simulated text.
* text: hidden states of the LLM at each token of a given text, behind sound and prompt, prompt or nothing.
* video: one vector per picture from a vision model, of the whole picture or of the face.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from sdumc.conditions import NO_SPEECH
from sdumc.data.kaldi_dir import KaldiDir
from sdumc.data.media import read_frames
from sdumc.data.shards import ShardWriter
from sdumc.data.tables import MediaSpan
from sdumc.errors import UserError
from sdumc.extraction.activity import lacks_speech
from sdumc.extraction.faces import FaceDetector, crop, track_face
from sdumc.extraction.finishing import BAD_MEDIA
from sdumc.extraction.loop import Output, absent_for_bad_media, extract_shard, read_wave, reason_if_allowed
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.quality import judge
from sdumc.pretrained.recogniser import CtcRecogniser, Heard, WhisperRecogniser
from sdumc.pretrained.speech import SpeechEncoder, SpeechReader, without_first
from sdumc.pretrained.vision import VisionExtractor


def extract_audio(
    data: KaldiDir, batches: Sequence[list[str]], encoder: SpeechEncoder, writer: ShardWriter, bad_media: str = "stop"
) -> None:
    """Write (frames, D) of the utterances in ``batches``: :func:`sdumc.extraction.loop.extract_shard`."""

    def compute(items: Sequence[tuple[str, np.ndarray]]) -> list[Output]:
        return [Output(x.float().cpu().numpy()) for x in encoder([wave for _, wave in items])]

    extract_shard(batches, writer, lambda utt: read_wave(data, utt), compute, bad_media)


def extract_transcripts(
    data: KaldiDir,
    batches: Sequence[list[str]],
    recogniser: CtcRecogniser | WhisperRecogniser,
    writer: ShardWriter,
    bad_media: str = "stop",
    speech_test: str = "level",
) -> None:
    """Note the transcripts of the utterances in ``batches``: :func:`sdumc.extraction.loop.extract_shard`.

    Args:
        speech_test: how clips without speech are found: :func:`sdumc.extraction.activity.lacks_speech`.
    """

    def compute(items: Sequence[tuple[str, np.ndarray]]) -> list[Output]:
        return [_transcript(heard) for heard in hear(recogniser, [wave for _, wave in items], speech_test)]

    def unheard(reason: str) -> Output:
        return Output(notes={"hyp": "", "status": "empty", "fallback": "absent", BAD_MEDIA: reason})

    extract_shard(batches, writer, lambda utt: read_wave(data, utt), compute, bad_media, unheard)


def hear(
    recogniser: CtcRecogniser | WhisperRecogniser, waves: Sequence[np.ndarray], speech_test: str = "level"
) -> list[Heard]:
    """Clips (T_i,) at 16 kHz -> transcripts; a clip without speech is not shown to the recogniser."""
    mute = [lacks_speech(wave, speech_test) for wave in waves]
    loud = [wave for wave, silent in zip(waves, mute, strict=True) if not silent]
    heard = iter(recogniser.hear(loud) if loud else [])
    return [Heard("", no_speech=True) if silent else next(heard) for silent in mute]


def status_of(heard: Heard) -> str:
    """``no-speech``, ``empty`` or ``ok``."""
    status = NO_SPEECH if heard.no_speech else judge(heard.text, heard.text.split())[0]
    return status if status in ("empty", NO_SPEECH) else "ok"


def _transcript(heard: Heard) -> Output:
    """Notes of a transcript; those of Whisper also say how sure it was, and whether its first attempt was given up."""
    notes = {"hyp": heard.text, "status": status_of(heard)}
    if heard.log_probability is not None:
        notes["log_probability"] = f"{heard.log_probability:.3f}"
    if heard.temperature > 0:
        notes |= {"fallback": "temperature", "temperature": f"{heard.temperature:g}"}
    return Output(notes=notes)


@dataclass(frozen=True)
class TextEncoder:
    """Hidden states of an LLM at the tokens of given texts.

    ``context`` is what stands before a text: ``audio+prompt`` the projected sound and the chat prompt, as in simulated
    text (this needs ``reader``); ``prompt`` the prompt alone; ``none`` only BOS, as in the released features of real
    text. ``keep_first`` also keeps the state before the first token (the prompt's end, or BOS).
    """

    llm: SpeechLLM
    context: str
    keep_first: bool = False
    reader: SpeechReader | None = None

    @property
    def reads_sound(self) -> bool:
        """Whether sound stands before the text."""
        return self.context == "audio+prompt"

    def of(self, utt: str) -> TextEncoder:
        """The encoder of an utterance, and of all others of its batch."""
        return self if self.reader is None else replace(self, reader=self.reader.of(utt))

    def __call__(self, texts: Sequence[str], waves: Sequence[np.ndarray | None]) -> list[Tensor]:
        """Texts, and the sound (T_i,) of each at 16 kHz or None -> states (N_i, D) float32.

        A text whose sound is None has the prompt alone before it, where others have sound and prompt.
        """
        states: dict[int, Tensor] = {}
        heard = [i for i, wave in enumerate(waves) if self.reads_sound and wave is not None]
        silent = [i for i in range(len(texts)) if i not in heard]
        if silent:
            chat = self.context != "none"
            contexts = self.llm.contexts([None] * len(silent), chat=chat)
            ids = [self.llm.answer_ids(texts[i]) if chat else self.llm.plain_ids(texts[i]) for i in silent]
            states.update(zip(silent, self.llm.encode(contexts, ids), strict=True))
        if heard:
            assert self.reader is not None
            contexts = self.reader.contexts([wave for wave in waves if wave is not None])
            ids = [self.llm.answer_ids(texts[i]) for i in heard]
            states.update(zip(heard, self.llm.encode(contexts, ids), strict=True))
        return [without_first(states[i], self.keep_first) for i in range(len(texts))]


@dataclass(frozen=True)
class _Unreadable:
    """In place of sound that could not be read."""

    reason: str


def extract_text(
    data: KaldiDir,
    texts: Mapping[str, str],
    batches: Sequence[list[str]],
    encoder: TextEncoder,
    writer: ShardWriter,
    bad_media: str = "stop",
    without: Mapping[str, str] | None = None,
) -> None:
    """Write the states of the utterances in ``batches``: :func:`sdumc.extraction.loop.extract_shard`.

    An utterance in ``without`` (id -> reason) has no text: the feature is absent.

    An empty text (a recogniser that heard nothing) gives one frame, the state before the first token. Sound that
    cannot be read, with ``bad_media`` "absent", is left out of the context.

    Raises:
        UserError: a text is absent, and as there.
    """
    for utt in (u for b in batches for u in b):
        if utt not in texts and utt not in (without or {}):
            raise UserError(f"{data.path}: utterance {utt!r} has no text to encode")

    def read(utt: str) -> np.ndarray | None:
        return read_wave(data, utt) if encoder.reads_sound and utt in texts else None

    def compute(items: Sequence[tuple[str, Any]]) -> list[Output]:
        said = [(utt, x) for utt, x in items if utt in texts]
        waves = [None if isinstance(x, _Unreadable) else x for _, x in said]
        states = encoder.of(items[0][0])([texts[utt] for utt, _ in said], waves) if said else []
        notes = [{BAD_MEDIA: x.reason} if isinstance(x, _Unreadable) else {} for _, x in said]
        found = {u: Output(s.cpu().numpy(), notes=n) for (u, _), s, n in zip(said, states, notes, strict=True)}
        return [found[utt] if utt in found else Output(absent=(without or {})[utt]) for utt, _ in items]

    extract_shard(batches, writer, read, compute, bad_media, _Unreadable)


log = logging.getLogger("sdumc")


class _UnreadablePictures(UserError):
    """Pictures that could be read when the face was looked for, and no longer."""


@dataclass
class Located:
    """Where the face is in a clip's pictures: ``boxes`` (N, 4), None for whole pictures; or why the clip has none.

    ``notes`` are kept beside the feature.
    """

    boxes: np.ndarray | None
    absent: str = ""
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureReader:
    """The pictures of a clip at ``fps`` a second, whole, or cut to the face where there is a ``detector``.

    ``margin`` is the side of the square that is cut out, in face widths; a clip in which the face is seen in less than
    ``min_seen`` of the pictures has none. Pictures are read twice (to find the face, and to cut it out) rather than
    kept: a long clip would fill the memory.
    """

    fps: float
    detector: FaceDetector | None = None
    margin: float = 1.3
    min_seen: float = 0.05

    def locate(self, span: MediaSpan) -> Located:
        """Find the face; :class:`UserError` if the file cannot be read to its end."""
        if self.detector is None:
            return Located(None)
        track = track_face([self.detector(picture) for _, picture in read_frames(span, self.fps)])
        seen = 0.0 if track is None else track.seen
        notes = {"face": f"{seen:.3f}"}
        if track is None or seen < self.min_seen:
            return Located(None, f"a face in {100 * seen:.0f}% of the pictures", notes)
        return Located(track.boxes, notes=notes)

    def pictures(self, span: MediaSpan, boxes: np.ndarray | None) -> Iterator[np.ndarray]:
        """RGB uint8 pictures (H, W, 3), whole or cut to the face's boxes; :class:`UserError` as above."""
        for i, (_, picture) in enumerate(read_frames(span, self.fps)):
            yield picture if boxes is None else crop(picture, boxes[min(i, len(boxes) - 1)], self.margin)


def extract_video(
    data: KaldiDir,
    utterances: Sequence[str],
    extractor: VisionExtractor,
    reader: PictureReader,
    writer: ShardWriter,
    bad_media: str = "stop",
) -> None:
    """Write (frames, D) of each utterance, one at a time: :func:`sdumc.extraction.loop.extract_shard`.

    The feature is absent where there is no video or no face.
    """

    def locate(utt: str) -> tuple[MediaSpan, Located] | Output:
        span = data.video_source(utt)
        found = Located(None, "no video in the data directory") if span is None else reader.locate(span)
        if span is None or found.absent:
            log.warning("%s: video taken as absent: %s", utt, found.absent)
            return Output(absent=found.absent, notes=found.notes)
        return span, found

    def compute(items: Sequence[tuple[str, tuple[MediaSpan, Located]]]) -> list[Output]:
        return [vectors(utt, *found) for utt, found in items]

    def vectors(utt: str, span: MediaSpan, found: Located) -> Output:
        try:
            return Output(extractor(_marked(reader.pictures(span, found.boxes))), notes=found.notes)
        except _UnreadablePictures as e:
            absent = absent_for_bad_media(reason_if_allowed(utt, e, bad_media))
            return Output(absent=absent.absent, notes={**found.notes, **absent.notes})

    extract_shard([[u] for u in utterances], writer, locate, compute, bad_media)


def _marked(pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The pictures; errors in reading them become distinguishable from the vision model's own."""
    try:
        yield from pictures
    except UserError as e:
        raise _UnreadablePictures(str(e)) from None
