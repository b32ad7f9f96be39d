"""Pickles that others publish, without running what is in them.

A pickle is a program. :func:`restricted_load` lets it build numpy arrays and plain containers, and nothing else.
"""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from sdumc.errors import UserError


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    """Replaces ``_codecs.encode``, with which pickles of old protocols spell bytes; other codecs are refused."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UserError(
            f"a pickle that calls codec {encoding!r}, which is not loaded; ask for the data as plain arrays"
        )
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Replaces ``bytes`` without arguments, an empty byte string of old protocols."""
    return b""


def _bytearray(value: bytes | str = b"", encoding: str = "latin1") -> bytearray:
    """Replaces ``bytearray`` of given content; of a number it would reserve that much memory."""
    return bytearray(_latin1_bytes(value, encoding) if isinstance(value, str) else bytes(memoryview(value)))


def _allowed_globals() -> dict[tuple[str, str], Any]:
    allowed: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _latin1_bytes,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }
    # numpy 2 moved these; files written by either are read with either.
    multiarray = getattr(np, "_core", None) or np.core
    for package in ("numpy.core", "numpy._core"):
        allowed[f"{package}.multiarray", "_reconstruct"] = multiarray.multiarray._reconstruct
        allowed[f"{package}.multiarray", "scalar"] = multiarray.multiarray.scalar
        allowed[f"{package}.numeric", "_frombuffer"] = multiarray.numeric._frombuffer
    for module in ("builtins", "__builtin__"):
        for name in ("set", "frozenset", "complex"):
            allowed[module, name] = getattr(builtins, name)
        allowed[module, "bytes"] = _no_bytes
        allowed[module, "bytearray"] = _bytearray
    return allowed


class _RestrictedUnpickler(pickle.Unpickler):
    _allowed = _allowed_globals()

    def __init__(self, file: IO[bytes], name: str):
        super().__init__(file, encoding="latin1")  # Python 2's byte strings, in which arrays were stored
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        if module.endswith("\r") or name.endswith("\r"):
            raise UserError(
                f"{self._name}: its line ends were changed (CRLF), as by a copy in text mode; fetch the file again"
            )
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UserError(
                f"{self._name}: refused: the pickle asks for {module}.{name}; only numpy arrays and plain containers "
                "are loaded, since anything else could run code: ask for the data in another format"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise UserError(f"{self._name}: refused: the pickle refers to objects outside of it")


def restricted_load(path_or_file: str | os.PathLike | IO[bytes]) -> Any:
    """Load a pickle of numpy arrays, numbers, strings, lists, tuples, dicts and sets.

    Args:
        path_or_file: a path, or a file opened for reading bytes.

    Raises:
        UserError: the file cannot be read, is not a pickle, is cut short, or asks for anything else: the message names
            what was refused.
    """
    if isinstance(path_or_file, (str, os.PathLike)):
        try:
            with open(path_or_file, "rb") as f:
                return _load(f, os.fspath(path_or_file))
        except OSError as e:
            raise UserError(f"{os.fspath(path_or_file)}: cannot be read ({e.strerror})") from None
    return _load(path_or_file, getattr(path_or_file, "name", "pickle"))


def _load(file: IO[bytes], name: str) -> Any:
    try:
        return _RestrictedUnpickler(file, str(name)).load()
    except (UserError, OSError, MemoryError):
        raise
    except EOFError:
        raise UserError(f"{name}: the pickle is cut short; copy it again") from None
    except Exception as e:  # pickle raises almost any exception on damaged input
        raise UserError(
            f"{name}: not a pickle that can be loaded ({e}); it may be cut short or of another kind"
        ) from None


def plain_text(value: Any, where: str) -> str:
    """A string of a pickle: as it is, or from bytes or from a byte string of Python 2, both UTF-8.

    Python 2's strings come as Latin-1; what is valid UTF-8 when read as such, with a letter beyond ASCII, was UTF-8.

    Raises:
        UserError: bytes that are not UTF-8, or no string or number at all.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bytes, bytearray, np.bytes_)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where}: {bytes(value)[:40]!r} is not UTF-8 text") from None
    if isinstance(value, str):
        if value.isascii():
            return str(value)
        try:
            return value.encode("latin1").decode("utf-8")
        except UnicodeError:
            return str(value)
    if isinstance(value, (int, float, np.number)):
        return str(value)
    raise UserError(f"{where}: a {type(value).__name__} where a text should be")


def load_npz_dicts(path: str | os.PathLike) -> dict[str, Any]:
    """Load a ``.npz`` whose members may be pickled objects, as ``label_official.npz`` of the SDUMC authors is.

    Returns:
        member name -> array; a member that is a single pickled object (shape ``()``) -> that object, such as a dict.

    Raises:
        UserError: as :func:`restricted_load`, or it is not an ``.npz``.
    """
    result = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as f:
                    result[member.removesuffix(".npy")] = _load_npy(f, f"{path}: {member}")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as e:
        raise UserError(f"{path}: not an .npz file, or cut short ({e}); copy it again") from None
    return result


def load_npy(path: str | os.PathLike) -> np.ndarray | Any:
    """Load a ``.npy`` array; one of pickled objects goes through the restricted unpickler.

    Raises:
        UserError: as :func:`restricted_load`, or it is not a ``.npy``.
    """
    try:
        with Path(path).open("rb") as f:
            return _load_npy(f, os.fspath(path))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None


def _load_npy(file: IO[bytes], name: str) -> Any:
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except (ValueError, KeyError) as e:
        raise UserError(f"{name}: not an array in numpy's format, or cut short ({e})") from None
    if dtype.hasobject:
        value = _load(file, name)
        return value.item() if isinstance(value, np.ndarray) and value.shape == () else value
    count = int(np.prod(shape, dtype=np.int64))
    raw = file.read(count * dtype.itemsize)
    if len(raw) != count * dtype.itemsize:
        raise UserError(f"{name}: cut short: {len(raw)} of {count * dtype.itemsize} bytes; copy it again")
    # A copy, since frombuffer gives memory that cannot be written to.
    return np.frombuffer(raw, dtype=dtype, count=count).reshape(shape, order="F" if fortran else "C").copy()
