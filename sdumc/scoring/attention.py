"""attention.npz: attention of the seven queries over the frames of a few utterances, written by decoding."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdumc.conditions import MODALITIES
from sdumc.errors import UserError
from sdumc.files import atomic_write

FILE = "attention.npz"
DRAWN = 6

# By utterance and modality (7, T); each row is a softmax over the T frames. Absent modalities are left out.
Attention = Mapping[str, Mapping[str, np.ndarray]]


def drawn_at_random(ids: Sequence[str], count: int = DRAWN) -> list[str]:
    """``count`` of the ids, in their order; they depend on the ids only, so that all models keep the same."""
    chosen = np.random.default_rng(0).permutation(len(ids))[:count]
    return [ids[i] for i in sorted(chosen.tolist())]


def write_attention(attention: Attention, folder: Path) -> None:
    """Write ``folder/attention.npz``: ids (K,), and per modality (sum of T, 7) float16 and the frames (K,) of each.

    If ``attention`` is empty, the file of an earlier decoding is removed.
    """
    ids = sorted(attention)
    if not ids:
        (folder / FILE).unlink(missing_ok=True)
        return
    arrays: dict[str, Any] = {"ids": np.array(ids)}
    for m in MODALITIES:
        rows = [attention[utt].get(m, np.zeros((7, 0), np.float32)).T for utt in ids]
        arrays[m] = np.concatenate(rows).astype(np.float16)
        arrays[f"{m}_frames"] = np.array([len(r) for r in rows], np.int32)
    with atomic_write(folder / FILE, "wb") as f:
        np.savez(f, **arrays)


def read_attention(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The attention that :func:`write_attention` wrote, as float32; empty if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        ids = arrays["ids"].tolist()
        found: dict[str, dict[str, np.ndarray]] = {utt: {} for utt in ids}
        for m in MODALITIES:
            frames, rows = arrays[f"{m}_frames"], arrays[m].astype(np.float32)
            if len(frames) != len(ids) or frames.sum() != len(rows):
                raise ValueError(f"{m} does not fit its frames")
            for utt, part in zip(ids, np.split(rows, np.cumsum(frames)[:-1]), strict=True):
                if len(part):
                    found[utt][m] = part.T
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: cannot be read ({e}); decode this condition again (stage 5)") from None
    return found
