"""Video features: one vector per picture from a vision model of transformers, of the whole picture or of the face."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sdumc.data.kaldi_dir import KaldiDir
from sdumc.data.media import read_frames
from sdumc.data.shards import ShardWriter
from sdumc.data.tables import MediaSpan
from sdumc.errors import UserError
from sdumc.extraction.faces import FaceDetector, crop, track_face
from sdumc.extraction.loop import Output, absent_for_bad_media, extract_shard, reason_if_allowed
from sdumc.pretrained.vision import VisionExtractor

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
