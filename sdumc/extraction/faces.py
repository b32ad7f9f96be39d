"""The speaker's face in a clip: detection in each picture, linking into tracks, choice of one, smoothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from sdumc.extraction.yunet import STRIDES, YuNet, decode

_LONGEST = 640  # pixels to which a picture's longer side is reduced for detection; faces of a speaker are large
_LEAST = 0.5  # score of a face, from 0 to 1
_LINK = 0.3  # overlap (intersection over union) from which a box continues a track


class FaceDetector:
    """Faces in RGB pictures, by the network of :mod:`sdumc.extraction.yunet`, on the CPU."""

    def __init__(self) -> None:
        self._network = YuNet.load()

    @torch.inference_mode()
    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """RGB uint8 (H, W, 3) -> boxes (n, 4) as x, y, width, height in pixels; none is (0, 4)."""
        height, width = picture.shape[:2]
        scale = min(1.0, _LONGEST / max(height, width))
        x = torch.from_numpy(np.ascontiguousarray(picture[:, :, ::-1])).permute(2, 0, 1)[None].float()
        if scale < 1:
            size = max(1, round(height * scale)), max(1, round(width * scale))
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        cell = STRIDES[-1]
        x = F.pad(x, (0, -x.shape[3] % cell, 0, -x.shape[2] % cell))
        boxes, _ = decode([found[0] for found in self._network(x)], _LEAST)
        return boxes / np.float32(scale)


@dataclass
class _Track:
    frames: list[int] = field(default_factory=list)
    boxes: list[np.ndarray] = field(default_factory=list)

    def weight(self) -> float:
        """The sum of box sides over the frames in which the face was seen: large for large and persistent faces."""
        return float(sum(np.sqrt(b[2] * b[3]) for b in self.boxes))


@dataclass
class FaceTrack:
    """One face through a clip: ``boxes`` (N, 4) for each frame, and the share of frames where it was truly seen."""

    boxes: np.ndarray
    seen: float


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (x, y, width, height)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return float(both / (a[2] * a[3] + b[2] * b[3] - both))


def track_face(detections: Sequence[np.ndarray], smoothing: int = 5, max_gap: int = 10) -> FaceTrack | None:
    """Choose one face for a whole clip.

    Boxes of consecutive frames are linked by overlap (over gaps of at most ``max_gap`` frames), the largest and most
    persistent track wins, tracks that follow or precede it (the same speaker after a cut) are joined where they do not
    compete, gaps are interpolated, and positions and sizes are averaged over ``smoothing`` frames.

    Args:
        detections: boxes (n_i, 4) for each of N frames.

    Returns:
        The track, or None if no frame has a face.
    """
    tracks: list[_Track] = []
    for i, boxes in enumerate(detections):
        free = [t for t in tracks if i - t.frames[-1] <= max_gap]
        pairs = sorted(
            ((overlap(t.boxes[-1], box), ti, bi) for ti, t in enumerate(free) for bi, box in enumerate(boxes)),
            key=lambda p: -p[0],
        )
        taken_tracks, taken_boxes = set(), set()
        for score, ti, bi in pairs:
            if score < _LINK or ti in taken_tracks or bi in taken_boxes:
                continue
            free[ti].frames.append(i)
            free[ti].boxes.append(boxes[bi])
            taken_tracks.add(ti)
            taken_boxes.add(bi)
        tracks += [_Track([i], [box]) for bi, box in enumerate(boxes) if bi not in taken_boxes]
    if not tracks:
        return None
    chosen: dict[int, np.ndarray] = {}
    spans: list[tuple[int, int]] = []
    heaviest = max(t.weight() for t in tracks)
    for t in sorted(tracks, key=_Track.weight, reverse=True):
        # Short or light tracks beside the first are false alarms of the detector.
        if spans and (len(t.frames) < 3 or t.weight() < 0.05 * heaviest):
            continue
        if all(t.frames[-1] < start or t.frames[0] > end for start, end in spans):
            spans.append((t.frames[0], t.frames[-1]))
            chosen.update(zip(t.frames, t.boxes, strict=True))
    frames = np.array(sorted(chosen))
    boxes = np.stack([chosen[i] for i in frames])
    every = np.arange(len(detections))
    filled = np.stack([np.interp(every, frames, boxes[:, c]) for c in range(4)], axis=1)
    return FaceTrack(_smooth(filled, smoothing), len(frames) / len(detections))


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average over ``width`` rows, shorter at the ends."""
    if width <= 1 or len(values) < 3:
        return values
    sums = np.cumsum(np.concatenate([np.zeros((1, values.shape[1])), values]), axis=0)
    i = np.arange(len(values))
    half = np.minimum(np.minimum(width // 2, i), len(values) - 1 - i)  # symmetric, so that ends do not drift
    return (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)[:, None]


def crop(picture: np.ndarray, box: Iterable[float], margin: float = 1.3) -> np.ndarray:
    """The square of ``margin`` times the box's larger side around its centre, filled up at the picture's edge."""
    x, y, width, height = box
    side = max(2, round(max(width, height) * margin))
    left, top = round(x + width / 2 - side / 2), round(y + height / 2 - side / 2)
    rows = np.clip(np.arange(top, top + side), 0, picture.shape[0] - 1)
    columns = np.clip(np.arange(left, left + side), 0, picture.shape[1] - 1)
    return np.ascontiguousarray(picture[rows[:, None], columns[None]])
