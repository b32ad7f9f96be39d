"""A dump folder: features as matrices in Kaldi archives, and labels; all that training and decoding need.

``dump/<set>/`` needs ``<name>.scp`` for one or more of :data:`sdumc.conditions.FEATURES`, and ``utt2label`` for
training and scoring. What :func:`sdumc.data.shards.merge_shards` writes beside it (``.frames``, ``.yaml``, ``.absent``)
``utt2spk`` and ``scale.yaml`` (:mod:`sdumc.scale`) may be absent: a folder with features from elsewhere is as good.

Matrices are in Kaldi's binary archives (ark), found through indexes (scp), and read safely in any process. In an
archive a matrix is ``utt `` + ``\\0BFM `` + rows and columns (each a byte 4 and a little-endian int32) + values in
float32, row by row; an index line is ``utt path:offset`` with the offset of the ``\\0B``
(https://kaldi-asr.org/doc/io.html). :mod:`sdumc.data.shards` writes archives.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdumc.conditions import FEATURES
from sdumc.data.tables import read_labels, read_table
from sdumc.errors import UserError
from sdumc.files import read_yaml
from sdumc.scale import CMU, LabelScale, scale_of

_MATRIX = struct.Struct("<2s3sbibi")  # \0B, FM_, 4, rows, 4, columns
_HEADER_BYTES = 32  # covers every matrix header that is understood here
# Kaldi's methods. Two bytes a value: linear between the smallest and the largest of the matrix. One byte a value:
# linear between the quartiles of each column (a matrix of 8 frames or fewer gets two bytes).
COMPRESSION = {"two-byte": 3, "one-byte": 1}


def split_rxspecifier(rxspecifier: str) -> tuple[str, int]:
    """Split ``path:offset`` (offset 0 when there is none).

    Raises:
        UserError: a pipe, or a row range in brackets.
    """
    text = rxspecifier.strip()
    if text.endswith("|") or text.startswith("|"):
        raise UserError(f"{text}: a command (pipe) instead of an archive; write the archive to disk and give its path")
    if text.endswith("]"):
        raise UserError(f"{text}: row ranges are not supported; write the rows wanted into an archive of their own")
    path, colon, offset = text.rpartition(":")
    if colon and offset.isdigit():
        return path, int(offset)
    return text, 0


def _open(rxspecifier: str) -> tuple[int, str, int]:
    path, offset = split_rxspecifier(rxspecifier)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), path, offset
    except OSError as e:
        raise UserError(
            f"{rxspecifier}: the archive cannot be opened ({e.strerror}); a relative path counts from {os.getcwd()}"
        ) from None


def _header(fd: int, rxspecifier: str, offset: int) -> tuple[str, int, int, int]:
    """Type ("FM", "DM", "CM", ...), rows, columns and header length of the matrix at ``offset``."""
    raw = os.pread(fd, _HEADER_BYTES, offset)
    kind = raw[2:5].rstrip(b" ").decode("latin1")
    try:
        if raw[:2] != b"\0B":
            raise ValueError
        if kind in ("FM", "DM"):
            _, _, a, rows, b, columns = _MATRIX.unpack_from(raw)
            if (a, b) != (4, 4):
                raise ValueError
            length = _MATRIX.size
        elif kind in ("CM", "CM2", "CM3"):  # global header: minimum, range (float32), rows, columns (int32)
            length = raw.index(b" ") + 1
            rows, columns = struct.unpack_from("<8xii", raw, length)
            length += 16
        else:
            raise ValueError
        if rows < 0 or columns < 0:
            raise ValueError
    except (ValueError, struct.error):
        if offset + len(raw) >= os.fstat(fd).st_size and len(raw) < _MATRIX.size:
            raise UserError(f"{rxspecifier}: the archive is cut short before this matrix; make it again") from None
        raise UserError(
            f"{rxspecifier}: no Kaldi binary matrix at this place; the index does not belong to this archive, or the "
            "archive holds something else: make both again"
        ) from None
    return kind, rows, columns, length


def _body_bytes(kind: str, rows: int, columns: int) -> int:
    if kind == "CM":  # four uint16 a column, then one byte a value
        return 8 * columns + rows * columns
    return rows * columns * {"FM": 4, "DM": 8, "CM2": 2, "CM3": 1}[kind]


def _check_length(fd: int, rxspecifier: str, end: int) -> None:
    if (size := os.fstat(fd).st_size) < end:
        raise UserError(
            f"{rxspecifier}: the archive is cut short: the matrix ends at byte {end}, the file at {size}; copy or make "
            "it again"
        )


def matrix_shape(rxspecifier: str) -> tuple[int, int]:
    """Rows and columns of a matrix, from its header, after checking that all of it is in the file.

    Raises:
        UserError: as :func:`load_matrix`.
    """
    fd, _, offset = _open(rxspecifier)
    try:
        kind, rows, columns, length = _header(fd, rxspecifier, offset)
        _check_length(fd, rxspecifier, offset + length + _body_bytes(kind, rows, columns))
        return rows, columns
    finally:
        os.close(fd)


def load_matrix(rxspecifier: str) -> np.ndarray:
    """Read one matrix from an archive.

    The file is opened and closed by each call and read at an explicit offset, so that processes forked from one
    another (data loader workers) cannot move each other's file position.

    Args:
        rxspecifier: ``path:offset`` as in an scp file.

    Returns:
        float32 (T, D), writable, owning its memory. Doubles and Kaldi-compressed matrices are converted.

    Raises:
        UserError: naming the archive, when it cannot be opened, is cut short, or has no matrix there.
    """
    fd, path, offset = _open(rxspecifier)
    try:
        kind, rows, columns, length = _header(fd, rxspecifier, offset)
        start, size = offset + length, _body_bytes(kind, rows, columns)
        _check_length(fd, rxspecifier, start + size)
        if kind in ("FM", "DM"):
            matrix = np.empty((rows, columns), dtype="<f4" if kind == "FM" else "<f8")
            _pread_into(fd, matrix, start, rxspecifier)
            return matrix.astype(np.float32, copy=False)
    finally:
        os.close(fd)
    import kaldiio

    # Only what is known to be a compressed matrix goes there: other types of that package can run code.
    return np.array(kaldiio.load_mat(f"{path}:{offset}"), dtype=np.float32)


def read_float_matrix(fd: int, offset: int, rows: np.ndarray) -> bool:
    """Fill ``rows`` with the float32 matrix of exactly its shape at ``offset``: one system call, one copy.

    Args:
        fd: an open archive; its file position is neither used nor moved.
        offset: of the ``\\0B``.
        rows: float32 (T, D), contiguous.

    Returns:
        False if something else is there, or not all of it could be read: ``rows`` is undefined then, and
        :func:`load_matrix` reads it or says what is wrong.
    """
    expected = _MATRIX.pack(b"\0B", b"FM ", 4, rows.shape[0], 4, rows.shape[1])
    header = bytearray(len(expected))
    try:
        count = os.preadv(fd, [header, rows.data], offset)
    except OSError:
        return False
    return header == expected and count == len(expected) + rows.nbytes


def all_finite(matrix: np.ndarray) -> bool:
    """Whether no value of a float32 array is NaN or infinite."""
    # A finite sum shows that all values are finite, in a third of the time of testing each. It may overflow.
    return math.isfinite(np.einsum("i->", matrix.reshape(-1))) or bool(np.isfinite(matrix).all())


def _pread_into(fd: int, matrix: np.ndarray, offset: int, rxspecifier: str) -> None:
    view = matrix.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):  # a single call moves at most 2 GiB
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as e:
            raise UserError(f"{rxspecifier}: reading failed ({e.strerror}); check the disk, or copy it again") from None
        if count == 0:
            raise UserError(f"{rxspecifier}: the archive became shorter while it was read; make it again")
        done += count


def matrix_bytes(matrix: np.ndarray, compression: str | None, where: str) -> tuple[bytes, memoryview]:
    """What stands in an archive for a float32 matrix (T, D), from its ``\\0B`` on, in two parts.

    Args:
        compression: a key of :data:`COMPRESSION`, or None.
        where: for the error message.

    Raises:
        UserError: the values lie too far apart to be compressed.
    """
    if not compression:
        return _MATRIX.pack(b"\0B", b"FM ", 4, matrix.shape[0], 4, matrix.shape[1]), matrix.data
    import kaldiio

    if float(matrix.max()) - float(matrix.min()) > np.finfo(np.float32).max:
        raise UserError(f"{where}: its values lie too far apart to be compressed; leave the compression out")
    file = io.BytesIO()
    kaldiio.save_ark(file, {"x": matrix}, compression_method=COMPRESSION[compression])
    return b"", memoryview(file.getvalue())[len(b"x ") :]


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
