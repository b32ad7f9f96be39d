"""YuNet, a small convolutional network that finds faces (Wu, Peng and Yu, "YuNet: a tiny millisecond-level face
detector", Machine Intelligence Research 2023).

``yunet.safetensors`` holds the 50,854 weights of libfacedetection (3-clause BSD licence, ``yunet.LICENSE``). They come
from its package ``yuface`` 2023.5.1, whose boxes this network gives to the pixel. The package is built for Python
3.10 and 3.11 on x86 only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_suffix(".safetensors")
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
