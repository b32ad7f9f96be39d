"""Computational sequences (.csd) of the CMU SDK: HDF5 files of time-stamped features or labels by video."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdumc.errors import UserError


@dataclass
class Sequence:
    """``intervals`` (m, 2) in seconds and ``features`` (m, D) by video, and the file's metadata."""

    intervals: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str, default: int) -> int:
        """The column that the metadata call ``name``; ``default`` where they do not name the columns."""
        names = self.metadata.get("dimension names")
        if isinstance(names, (list, tuple)):
            lowered = [str(n).strip().lower() for n in names]
            if name in lowered:
                return lowered.index(name)
        return default


def read_csd(path: str | Path) -> Sequence:
    """Read ``<root>/data/<video>/{intervals,features}`` and ``<root>/metadata``.

    Entries named ``video[3]``, as sequences aligned to others have them, count to their video. Rows are as in the file:
    they can be out of time order and overlap, and start below zero.

    Raises:
        UserError: the file cannot be read, is cut short, or is not of this structure; h5py is not installed.
    """
    path = Path(path)
    try:
        import h5py
    except ImportError:
        raise UserError(
            f"{path}: reading .csd files needs h5py: tools/setup_env.sh --extras mosei (or pip install h5py)"
        ) from None
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            return _read(path, file)
    except (OSError, RuntimeError, KeyError) as e:
        raise UserError(f"{path}: not an HDF5 file that can be read, or cut short ({e}); copy it again") from None


def _read(path: Path, file: Any) -> Sequence:
    roots = [name for name in file if "data" in file[name]]
    if len(roots) != 1:
        raise UserError(f"{path}: expected one sequence in the file, found {len(roots)}; is it a .csd file?")
    result = Sequence()
    group = file[roots[0]]
    for key, value in group.get("metadata", {}).items():
        result.metadata[key] = _metadata(value)
    parts: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for entry, content in group["data"].items():
        if "intervals" not in content or "features" not in content:
            raise UserError(f"{path}: {roots[0]}/data/{entry}: has no intervals or no features")
        intervals = np.asarray(content["intervals"][()], dtype=np.float64)
        features = np.asarray(content["features"][()], dtype=np.float64)
        if intervals.ndim != 2 or intervals.shape[1] != 2 or features.ndim != 2 or len(features) != len(intervals):
            raise UserError(
                f"{path}: {roots[0]}/data/{entry}: intervals {intervals.shape} and features {features.shape} do not "
                "fit together, expected (m, 2) and (m, D)"
            )
        match = re.fullmatch(r"(.+)\[(\d+)\]", entry)
        video, index = (match[1], int(match[2])) if match else (entry, 0)
        parts.setdefault(video, []).append((index, intervals, features))
    for video, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0])
        if len({f.shape[1] for _, _, f in pieces}) > 1:
            raise UserError(f"{path}: {roots[0]}/data/{video}: parts of different width")
        result.intervals[video] = np.concatenate([i for _, i, _ in pieces])
        result.features[video] = np.concatenate([f for _, _, f in pieces])
    return result


def _metadata(value: Any) -> Any:
    """A metadata entry: JSON in an array of one string."""
    try:
        content = value[()]
        if isinstance(content, np.ndarray):
            content = content.reshape(-1)[0]
        text = content.decode("utf-8") if isinstance(content, bytes) else str(content)
    except (IndexError, UnicodeDecodeError, AttributeError, TypeError):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
