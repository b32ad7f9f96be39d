"""A dump folder: features as Kaldi archives and their labels, all that training and decoding need.

``dump/<set>/`` needs ``<name>.scp`` for one or more of :data:`sdumc.conditions.FEATURES`, and ``utt2label`` for
training and scoring. What :func:`sdumc.data.shards.merge_shards` writes beside it (``.frames``, ``.yaml``, ``.absent``)
``utt2spk`` and ``scale.yaml`` (:mod:`sdumc.scale`) may be absent: a folder with features from elsewhere is as good.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdumc.conditions import FEATURES
from sdumc.data.ark import matrix_shape, split_rxspecifier
from sdumc.data.tables import read_labels, read_table
from sdumc.errors import UserError
from sdumc.files import read_yaml
from sdumc.scale import CMU, LabelScale, scale_of


@dataclass
class Feature:
    """One feature of a set: where each utterance's matrix (T, dim) is, how long it is, and who has none.

    ``meta`` is the content of ``<name>.yaml``, empty when there is no such file. Where the feature is absent in all
    utterances of the set, ``entries`` is empty, and ``dim`` what the yaml states, or 0.
    """

    name: str
    dim: int
    entries: dict[str, str] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Dump:
    """A loaded dump folder. ``labels``, on its ``scale``, and ``utt2spk`` are empty when their files are absent.

    Of several folders joined to one, ``sizes`` are their numbers of utterances, which follow each other, and ``origin``
    has each utterance's folder and its name there.
    """

    path: Path
    utterances: list[str]
    labels: dict[str, float]
    features: dict[str, Feature]
    utt2spk: dict[str, str] = field(default_factory=dict)
    scale: LabelScale = CMU
    sizes: list[int] = field(default_factory=list)
    origin: dict[str, tuple[Path, str]] = field(default_factory=dict)

    def place(self, utt: str) -> tuple[Path, str]:
        """The folder that an utterance is from, and its name there."""
        return self.origin.get(utt, (self.path, utt))


def load_dump(
    path: str | os.PathLike,
    names: Sequence[str] = FEATURES,
    require: Sequence[str] = (),
) -> Dump:
    """Load the indexes of a dump folder; the matrices stay on disk.

    Args:
        path: the folder.
        names: features to load if they are there.
        require: features that must be there; ``"utt2label"`` may be among them.

    Raises:
        UserError: naming the file and utterance, when a required file is missing, a table is unsorted or has doubled
            ids, a label is not a number in range, ids differ between files without being listed in ``<name>.absent``,
            an archive is missing or cut short, or dimensions within a feature differ.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such dump folder")
    for name in require:
        file = path / (name if name == "utt2label" else f"{name}.scp")
        if not file.exists():
            raise UserError(f"{file}: missing, but needed; run the stage that makes it, or check the folder's name")
    present = [name for name in dict.fromkeys([*names, *require]) if (path / f"{name}.scp").exists()]
    if not present:
        raise UserError(f"{path}: holds none of {', '.join(f'{n}.scp' for n in names)}; this is no dump folder")
    features = {name: _load_feature(path, name) for name in present}
    scale = scale_of(path)
    if (path / "utt2label").exists():
        labels = read_labels(path / "utt2label", (scale.low, scale.high))
        utterances, source = sorted(labels), path / "utt2label"
        if not utterances:
            raise UserError(f"{source}: empty; it must list every utterance with its label")
    else:
        labels = {}
        first = features[present[0]]
        utterances, source = sorted(first.entries.keys() | first.absent.keys()), path / f"{present[0]}.scp"
    for feature in features.values():
        _check_ids(path / f"{feature.name}.scp", feature.entries.keys() | feature.absent.keys(), utterances, source)
    utt2spk = read_table(path / "utt2spk") if (path / "utt2spk").exists() else {}
    if utt2spk:
        _check_ids(path / "utt2spk", utt2spk.keys(), utterances, source)
    return Dump(path=path, utterances=utterances, labels=labels, features=features, utt2spk=utt2spk, scale=scale)


def _check_ids(file: Path, found, utterances: Sequence[str], source: Path) -> None:
    wanted = set(utterances)
    if missing := sorted(wanted - found):
        hint = f", or list them with a reason in {file.with_suffix('.absent')}" if file.suffix == ".scp" else ""
        raise UserError(
            f"{file}: {len(missing)} utterances of {source} are missing, the first: {_some(missing)}; add them{hint}"
        )
    if extra := sorted(found - wanted):
        raise UserError(
            f"{file}: {len(extra)} utterances are not in {source}, the first: {_some(extra)}; "
            "remove them, or add them there"
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:3]))


def _load_feature(path: Path, name: str) -> Feature:
    scp = path / f"{name}.scp"
    table = read_table(scp)
    absent = _optional_table(path / f"{name}.absent")
    if not table:
        if not absent:
            raise UserError(f"{scp}: empty; remove it, or make it again")
        meta = _meta(path / f"{name}.yaml", None)
        return Feature(name=name, dim=int(meta.get("dim") or 0), absent=absent, meta=meta)
    if both := sorted(absent.keys() & table.keys()):
        raise UserError(f"{path / f'{name}.absent'}: utterance {both[0]!r}: is in {scp} too; remove one of the two")
    resolved: dict[str, str] = {}  # archive as written -> as found
    entries: dict[str, str] = {}
    last: dict[str, tuple[int, str]] = {}  # archive -> its furthest entry
    for utt, value in table.items():
        archive, offset = split_rxspecifier(value)
        if archive not in resolved:
            resolved[archive] = _resolve(archive, path, scp, utt)
        entries[utt] = f"{resolved[archive]}:{offset}"
        last[archive] = max(last.get(archive, (-1, "")), (offset, utt))
    first_utt = next(iter(entries))
    dim = _shape(entries, first_utt, scp)[1]
    # Read the end of each archive: a copy that was cut short is found now, not after hours of training.
    for _, utt in last.values():
        _shape(entries, utt, scp)
    frames = _frames(path / f"{name}.frames", entries, scp, dim)
    meta = _meta(path / f"{name}.yaml", dim)
    return Feature(name=name, dim=dim, entries=entries, frames=frames, absent=absent, meta=meta)


def _optional_table(path: Path) -> dict[str, str]:
    return read_table(path) if path.exists() else {}


def _resolve(archive: str, folder: Path, scp: Path, utt: str) -> str:
    """Find an archive: as Kaldi does from the working directory, else from the dump folder or one above it."""
    if os.path.exists(archive):
        return archive
    places = [folder.absolute(), *folder.absolute().parents] if not os.path.isabs(archive) else []
    candidates = [place / archive for place in places]
    candidates.append(folder / "ark" / os.path.basename(archive))  # the folder was moved as a whole
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    raise UserError(
        f"{scp}: utterance {utt!r}: archive {archive} not found, from {os.getcwd()} or from {folder} and the folders "
        "above it; correct the path, or make the feature again"
    )


def _shape(entries: Mapping[str, str], utt: str, scp: Path) -> tuple[int, int]:
    try:
        rows, columns = matrix_shape(entries[utt])
    except UserError as e:
        raise UserError(f"{scp}: utterance {utt!r}: {e}") from None
    if rows == 0 or columns == 0:
        raise UserError(
            f"{scp}: utterance {utt!r}: empty matrix ({rows}, {columns}) at {entries[utt]}; list the utterance in "
            f"{scp.with_suffix('.absent')} instead"
        )
    return rows, columns


def _frames(path: Path, entries: Mapping[str, str], scp: Path, dim: int) -> dict[str, int]:
    """Frames of each utterance from ``<name>.frames``, or from the archives' headers when there is no such file."""
    if not path.exists():
        shapes = {utt: _shape(entries, utt, scp) for utt in entries}
        for utt, (_, columns) in shapes.items():
            if columns != dim:
                raise UserError(
                    f"{scp}: utterance {utt!r}: dimension {columns}, but {dim} in {next(iter(entries))!r}; one feature "
                    "must come from one model and setting"
                )
        return {utt: rows for utt, (rows, _) in shapes.items()}
    table = read_table(path)
    _check_ids(path, table.keys(), list(entries), scp)
    for number, (utt, value) in enumerate(table.items(), start=1):
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise UserError(f"{path}:{number}: utterance {utt!r}: {value!r} is not a number of frames; remove {path}")
    return {utt: int(value) for utt, value in table.items()}


def _meta(path: Path, dim: int | None) -> dict[str, Any]:
    if not path.exists():
        return {}
    meta = read_yaml(path)
    if dim is not None and meta.get("dim", dim) != dim:
        raise UserError(f"{path}: states dimension {meta['dim']}, but the matrices have {dim}; make the feature again")
    return meta
