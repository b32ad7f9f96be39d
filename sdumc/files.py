"""Files: atomic writes (a file appears under its final name when it is whole), and strict reading of YAML and JSON."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from sdumc.errors import UserError

_REQUIRED = object()
_MOVING = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shown(path: str | os.PathLike) -> str:
    """A path as it is printed: bytes of its name that are not UTF-8 are escaped (``\\xe9``), and so are characters that
    would move the cursor of a terminal, colour it, or turn the text round."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return _MOVING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def disk_full(path: str | os.PathLike, error: OSError) -> UserError | None:
    """The error message for a full disk; None if ``error`` is another error."""
    if error.errno not in _DISK_FULL:
        return None
    return UserError(
        f"{path}: could not be written ({error.strerror}); files that were complete before are kept. Free space and "
        "run the same command again"
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
    # It is renamed or removed before it is closed, because closing releases the lock on its name.
    with contextlib.closing(os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8")) as f:
        try:
            yield f
            f.flush()
            os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException as e:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            # Closing tries to write the rest of the buffer, and can fail in the same way.
            with contextlib.suppress(OSError):
                f.close()
            if isinstance(e, OSError) and (error := disk_full(path, e)):
                raise error from None
            raise


def _open_temporary(path: Path) -> tuple[int, str]:
    """Descriptor and name of a file beside ``path`` that no other process writes.

    The name is always the same, unless it is in use: files that killed runs leave behind are overwritten by the next
    run and do not accumulate.
    """
    usual = path.with_name(f".{path.name}.tmp")
    with contextlib.suppress(OSError):
        fd = os.open(usual, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(usual).st_ino == os.fstat(fd).st_ino:  # else another process has renamed it meanwhile
                os.ftruncate(fd, 0)
                return fd, str(usual)
        except OSError:  # the name is in use, or the file system has no locks
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
    """A copy of a plain value with None in place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def read_json(path: str | os.PathLike, advice: str, absent: Any = _REQUIRED) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        advice: what the user can do when it is damaged or missing, such as "run stage 5 again".
        absent: what to return where there is no such file; an error if not given.

    Raises:
        UserError: the file is missing (without ``absent``), cannot be read, or is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        if absent is not _REQUIRED:
            return absent
        raise UserError(f"{path}: not there; {advice}") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); {advice}") from None
    except ValueError as e:  # wrong UTF-8 too
        raise UserError(f"{path}: not valid JSON ({e}); {advice}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error: the second would silently win."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike) -> dict:
    """Read a YAML mapping with plain values.

    Raises:
        UserError: the file is missing, is not YAML, gives a key twice, or is not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as f:
            content = yaml.load(f, Loader=_UniqueKeyLoader)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML: {e}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(content).__name__}")
    return content


def settings_chain(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """A settings file, then the one its ``base:`` names (relative to it), then that one's base, and so on.

    Yields:
        each file's path and its own keys without ``base``; the keys of an earlier file win.

    Raises:
        UserError: a file cannot be read, or a base leads back to a file that came before.
    """
    seen: list[str] = []
    file: str | None = os.fspath(path)
    while file is not None:
        keys = read_yaml(file)
        seen.append(os.path.abspath(file))
        base = keys.pop("base", None)
        yield file, keys
        if base is None:
            return
        above, file = file, os.path.join(os.path.dirname(file), str(base))
        if os.path.abspath(file) in seen:
            raise UserError(f"{above}: base {file} leads back to itself")


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A short hash of settings (plain values and paths), the same on every machine."""
    text = json.dumps(settings, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recall(name: str, key: Any) -> Any:
    """What :func:`remember` stored under a name for the same ``key``; None if nothing did."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(_memory(name, key).read_text(encoding="utf-8"))
        if found["key"] == json.loads(json.dumps(key)):
            return found["value"]
    return None


def remember(name: str, key: Any, value: Any) -> None:
    """Store a plain value in the user's cache folder (``$SDUMC_CACHE``, by default ``~/.cache/sdumc``), which may be
    emptied at any time. If it cannot be written to, nothing is remembered."""
    with contextlib.suppress(OSError, UserError):
        write_text(_memory(name, key), json.dumps({"key": key, "value": value}))


def _memory(name: str, key: Any) -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get("SDUMC_CACHE") or os.path.join(caches, "sdumc"))
    return folder / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
