"""Outputs appear under their final names only when whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sdumc.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(path: str | os.PathLike, error: OSError) -> UserError | None:
    """What to tell a user whose disk is full; None if ``error`` is another one."""
    if error.errno not in _DISK_FULL:
        return None
    return UserError(
        f"{path}: could not be written ({error.strerror}); what was whole on disk before is kept. Free space and run "
        "the same command again"
    )


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside ``path``; rename it to ``path`` on success, remove it on any failure.

    The data is flushed to disk before the rename, so that a crash leaves either the old or the new file.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = _open_temporary(path)
    except OSError as e:
        raise disk_full(path, e) or UserError(f"{path}: cannot be written ({e.strerror})") from None
    # Renamed or removed before it is closed, as closing ends the lock on its name.
    with contextlib.closing(os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8")) as f:
        try:
            yield f
            f.flush()
            os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException as e:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            # Closing would try to write what is left in the buffer, and fail in the same way.
            with contextlib.suppress(OSError):
                f.close()
            if isinstance(e, OSError) and (told := disk_full(path, e)):
                raise told from None
            raise


def _open_temporary(path: Path) -> tuple[int, str]:
    """Descriptor and name of a file beside ``path`` that no one else writes.

    It has always the same name unless that is in use, so that what killed runs leave behind is written over by the
    next one and does not pile up.
    """
    usual = path.with_name(f".{path.name}.tmp")
    with contextlib.suppress(OSError):
        fd = os.open(usual, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(usual).st_ino == os.fstat(fd).st_ino:  # else it has got its final name in the meantime
                os.ftruncate(fd, 0)
                return fd, str(usual)
        except OSError:  # in use, or a file system without locks
            pass
        os.close(fd)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.fchmod(fd, 0o666 & ~_umask())
    return fd, name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_write(path) as f:
        f.write(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically; NaN is written as null, as JSON has none."""
    with atomic_write(path) as f:
        json.dump(json_ready(value), f, indent=2, ensure_ascii=False)
        f.write("\n")


def json_ready(value: Any) -> Any:
    """The same plain value with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, float) and value != value:
        return None
    return value
