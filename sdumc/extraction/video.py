"""Video features: one vector per picture from a vision model of transformers, of the whole picture or of the face."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from sdumc.data.ark import ShardWriter
from sdumc.data.kaldi_dir import KaldiDir, MediaSpan
from sdumc.data.media import read_frames
from sdumc.errors import UserError
from sdumc.extraction.faces import FaceDetector, crop, track_face
from sdumc.extraction.jobs import Progress, ahead
from sdumc.pretrained.vision import VisionExtractor

log = logging.getLogger("sdumc")


def extract_video(
    data: KaldiDir,
    utterances: Sequence[str],
    extractor: VisionExtractor,
    writer: ShardWriter,
    fps: float,
    detector: FaceDetector | None = None,
    margin: float = 1.3,
    min_seen: float = 0.05,
    bad_media: str = "stop",
) -> None:
    """Write (frames, D) of every utterance that ``writer`` does not have yet; commit each.

    With a ``detector``, the face is tracked through the clip and cut out; a clip in which it is seen in less than
    ``min_seen`` of the frames is absent, with the reason. Pictures are read twice then (to find the face, to cut it
    out) rather than kept: a long clip would fill the memory.

    Raises:
        UserError: a media file cannot be read to its end (unless ``bad_media`` is "absent").
    """
    progress = Progress(len(utterances), len(writer.done))
    todo = [[u] for u in utterances if u not in writer.done]

    def locate(batch: list[str]) -> tuple[np.ndarray | None, str, dict[str, str]]:
        """Runs while the model works on the clip before."""
        span = data.video_source(batch[0])
        if span is None:
            return None, "no video in the data directory", {}
        try:
            return locate_face(span, fps, detector, min_seen)
        except UserError as e:
            reason = _unless_absent(e, bad_media)
            return None, reason, {"bad_media": reason}

    for (utt,), (boxes, reason, notes) in ahead(todo, locate):
        features = None
        if not reason:
            try:
                features = extractor(cut_pictures(data.video_source(utt), fps, boxes, margin))
            except UserError as e:
                reason = notes["bad_media"] = _unless_absent(e, bad_media)
        if features is None:
            log.warning("%s: video taken as absent: %s", utt, reason)
            writer.absent(utt, reason, **notes)
        else:
            writer.write(utt, features, **notes)
        writer.commit()
        progress.step(1)


def _unless_absent(error: UserError, bad_media: str) -> str:
    if bad_media != "absent":
        raise UserError(f"{error} (or go on without it: --bad-media absent)") from None
    return str(error)


def locate_face(
    span: MediaSpan, fps: float, detector: FaceDetector | None, min_seen: float
) -> tuple[np.ndarray | None, str, dict[str, str]]:
    """Boxes of the face (N, 4), None without a ``detector``; or the reason for the clip's having none; and notes.

    Raises:
        UserError: the file cannot be read to its end.
    """
    if detector is None:
        return None, "", {}
    track = track_face([detector(picture) for _, picture in read_frames(span, fps)])
    if track is None or track.seen < min_seen:
        seen = 0.0 if track is None else track.seen
        return None, f"a face in {100 * seen:.0f}% of the pictures", {"face": f"{seen:.3f}"}
    return track.boxes, "", {"face": f"{track.seen:.3f}"}


def cut_pictures(span: MediaSpan | None, fps: float, boxes: np.ndarray | None, margin: float) -> Iterator[np.ndarray]:
    """The pictures of a clip at ``fps``, whole or cut to ``margin`` times the face's boxes."""
    assert span is not None
    for i, (_, picture) in enumerate(read_frames(span, fps)):
        yield picture if boxes is None else crop(picture, boxes[min(i, len(boxes) - 1)], margin)
