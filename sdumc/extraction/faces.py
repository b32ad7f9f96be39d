"""The speaker's face in a clip: detection in each picture, linking into tracks, choice of one, smoothing.

The detector is YuNet, a small convolutional network (Wu, Peng and Yu, "YuNet: a tiny millisecond-level face detector",
Machine Intelligence Research 2023). ``yunet.safetensors`` holds the 50,854 weights of libfacedetection (3-clause BSD
licence, ``yunet.LICENSE``). They come from its package ``yuface`` 2023.5.1, whose boxes this network gives to the
pixel. The package is built for Python 3.10 and 3.11 on x86 only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("yunet.safetensors")
STRIDES = (8, 16, 32)  # pixels between the cells of the three output maps
_SAME = 0.3  # overlap (intersection over union) from which the less certain of two boxes is left out


class _Separable(nn.Sequential):
    """A 1x1 convolution, then a 3x3 one for each channel by itself."""

    def __init__(self, inside: int, outside: int, relu: bool = True):
        super().__init__(nn.Conv2d(inside, outside, 1), nn.Conv2d(outside, outside, 3, padding=1, groups=outside))
        if relu:
            self.append(nn.ReLU())


def _pair(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(_Separable(inside, inside), _Separable(inside, outside))


class YuNet(nn.Module):
    """Pictures (B, 3, H, W), BGR from 0 to 255, H and W multiples of 32 -> three maps (B, 6, H / stride, W / stride).

    Channels: certainty that there is a face, and that the box fits (both before the sigmoid); horizontal and vertical
    distance of the box's centre from the cell's corner, and logarithm of width and height, all in strides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), _Separable(16, 16))
        self.early = nn.Sequential(_pair(16, 32), _pair(32, 64))
        self.stages = nn.ModuleList(_pair(64, 64) for _ in STRIDES)
        self.neck = nn.ModuleList(_Separable(64, 64) for _ in STRIDES)
        self.faces = nn.ModuleList(_Separable(64, 1, relu=False) for _ in STRIDES)
        self.fits = nn.ModuleList(_Separable(64, 1, relu=False) for _ in STRIDES)
        self.boxes = nn.ModuleList(_Separable(64, 4, relu=False) for _ in STRIDES)

    @classmethod
    def load(cls) -> YuNet:
        """The network with the weights of libfacedetection."""
        with torch.device("meta"):  # no random numbers are drawn for weights that are replaced
            network = cls()
        network.load_state_dict(load_file(WEIGHTS), assign=True)
        return network.eval()

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        x = F.max_pool2d(self.early(F.max_pool2d(self.stem(pictures), 2)), 2)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else F.max_pool2d(x, 2))
            maps.append(x)
        for i in (2, 1, 0):  # the coarse maps pass what they know to the finer ones
            if i < 2:
                maps[i] = maps[i] + F.interpolate(maps[i + 1], scale_factor=2, mode="nearest")
            maps[i] = self.neck[i](maps[i])
        return [torch.cat([h[i](x) for h in (self.faces, self.fits, self.boxes)], 1) for i, x in enumerate(maps)]


def decode(maps: list[torch.Tensor], least: float) -> tuple[np.ndarray, np.ndarray]:
    """Maps (6, h, w) of one picture -> boxes (n, 4) as x, y, width, height in pixels, and their scores (n,) from
    ``least`` to 1, the most certain first; of boxes that overlap only the most certain."""
    boxes, scores = [], []
    for x, stride in zip(maps, STRIDES, strict=True):
        certain = (x[0].sigmoid() * x[1].sigmoid()).sqrt()
        row, column = torch.nonzero(certain >= least, as_tuple=True)
        right, down, width, height = x[2:, row, column]
        width, height = width.exp(), height.exp()
        box = torch.stack([column + right - width / 2, row + down - height / 2, width, height], 1) * stride
        boxes.append(box)
        scores.append(certain[row, column])
    return _distinct(torch.cat(boxes).float().numpy(), torch.cat(scores).float().numpy())


def _distinct(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-maximum suppression."""
    order = np.argsort(-scores, kind="stable")
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    areas = boxes[:, 2] * boxes[:, 3]
    kept = []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        sides = np.minimum(corners[first, 2:], corners[order, 2:]) - np.maximum(corners[first, :2], corners[order, :2])
        both = np.clip(sides, 0, None).prod(axis=1)
        order = order[both / (areas[first] + areas[order] - both) < _SAME]
    return boxes[kept], scores[kept]


_LONGEST = 640  # pixels to which a picture's longer side is reduced for detection; faces of a speaker are large
_LEAST = 0.5  # score of a face, from 0 to 1
_LINK = 0.3  # overlap (intersection over union) from which a box continues a track


class FaceDetector:
    """Faces in RGB pictures, by the network of :mod:`sdumc.extraction.faces`, on the CPU."""

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
