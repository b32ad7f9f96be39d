"""Matrices in Kaldi's binary archives (ark), found through indexes (scp): the format, and reads safe in any process.

A matrix in an archive is ``utt `` + ``\\0BFM `` + rows and columns (each a byte 4 and a little-endian int32) + float32
values, row by row; an index line is ``utt path:offset`` with the offset of the ``\\0B``
(https://kaldi-asr.org/doc/io.html). :mod:`sdumc.data.shards` writes archives.
"""

from __future__ import annotations

import io
import math
import os
import struct

import numpy as np

from sdumc.errors import UserError

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
