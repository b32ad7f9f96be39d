"""Processes that decode media. A file that crashes FFmpeg, hangs or fills the memory ends one of them, nothing else.

A process serves many files; when it ends, the file at which it ended is tried once more in a new one, because what it
died of may have been left by the file before. There is one process for each read that is in progress at a time (two,
where pictures are read ahead). Requests and answers go over a socket: a header in JSON, and bytes.

Limits, which the kernel enforces: :data:`MOST_MEMORY` of address space, :data:`MOST_SECONDS` of processor time between
two answers. An answer comes at least every ten seconds of sound, and every few pictures. Besides, a process that does
not answer within :data:`MOST_WAITING` is killed; so is one that keeps :data:`KEPT_MEMORY` after its work.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sdumc.data.tables import MediaSpan, PastEnd
from sdumc.errors import UserError

log = logging.getLogger("sdumc")

MOST_MEMORY = 4 << 30  # bytes
MOST_SECONDS = 120
MOST_WAITING = 600  # seconds
KEPT_MEMORY = 768 << 20
_HEAD = struct.Struct("<IQ")
_ROOT = Path(__file__).resolve().parents[2]
_AHEAD = 2  # messages with pictures that may be on their way
_BATCH = 4 << 20  # bytes of pictures in a message, about
Message = tuple[dict[str, Any], bytearray]


def send(connection: socket.socket, head: dict[str, Any], body: Any = b"") -> None:
    """Write a message."""
    text = json.dumps(head).encode()
    view = memoryview(body).cast("B")
    connection.sendall(_HEAD.pack(len(text), len(view)) + text)
    if len(view):
        connection.sendall(view)


def receive(connection: socket.socket) -> Message | None:
    """Read a message; None when the other side has ended."""
    head = _read(connection, _HEAD.size)
    if head is None:
        return None
    text_size, size = _HEAD.unpack(head)
    text = _read(connection, text_size)
    body = _read(connection, size)
    return None if text is None or body is None else (json.loads(bytes(text)), body)


def _read(connection: socket.socket, size: int) -> bytearray | None:
    found = bytearray(size)
    view = memoryview(found)
    while len(view):
        try:
            count = connection.recv_into(view)
        except ConnectionError:
            return None
        if not count:
            return None
        view = view[count:]
    return found


# -------------------------------------------------------------------------------------------------- in the commands


class _Ended(Exception):
    """The process ended instead of answering. ``again``: another one may succeed."""

    def __init__(self, reason: str, again: bool):
        super().__init__(reason)
        self.again = again


class _Process:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(MOST_WAITING)
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sdumc.data.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # glibc's last words; the reason is said by the reader
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the command, which then ends this too
            )
        self.connection = ours
        self.used = False

    def send(self, head: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended: receive() says how
            send(self.connection, head)

    def receive(self) -> Message:
        try:
            message = receive(self.connection)
        except TimeoutError:
            self.end(kill=True)
            raise _Ended(f"did not answer for {MOST_WAITING} s", again=False) from None
        if message is None:
            number = -self.end()
            if number == signal.SIGXCPU:
                raise _Ended(f"took more than {MOST_SECONDS} s of processor time for a small part", again=False)
            name = signal.Signals(number).name if number in set(signal.Signals) else f"code {-number}"
            raise _Ended(f"crashed ({name})", again=True)
        return message

    def end(self, kill: bool = False) -> int:
        """Its exit code."""
        self.connection.close()
        if kill:
            self.process.kill()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


_idle: list[_Process] = []
_lock = threading.Lock()


def start_early() -> None:
    """Start a process now, for a read that will come."""
    with _lock:
        if not _idle:
            _idle.append(_Process())


def _take() -> _Process:
    with _lock:
        while _idle:
            process = _idle.pop()
            if process.process.poll() is None:
                return process
            process.end()
    return _Process()


def _give_back(process: _Process, memory: int) -> None:
    if memory > KEPT_MEMORY or process.process.poll() is not None:
        process.end()
        return
    with _lock:
        _idle.append(process)


@atexit.register
def end_all() -> None:
    """End the processes that wait for work."""
    with _lock:
        processes = _idle[:]
        _idle.clear()
    for process in processes:
        process.connection.close()
    for process in processes:
        process.end()


os.register_at_fork(after_in_child=_idle.clear)


def ask(span: MediaSpan, what: str, **details: Any) -> Iterator[Message]:
    """Have a process do ``what``; yields its answers, the last of which has ``done``.

    An answer with ``again`` takes back those before it.

    Raises:
        UserError: what the process found to be wrong with the file, or that it ended on it.
    """
    request = {"do": what, "cwd": os.getcwd(), **details}
    request["span"] = [span.path, span.start, span.end, span.utterance]
    for attempt in (1, 2):
        try:
            if attempt == 2:
                yield {"again": True}, bytearray()
            yield from _ask(request)
            return
        except _Ended as e:
            if attempt == 2 or not e.again:
                raise UserError(
                    f"{span}: its decoder {e}; convert it, or copy or make it again if it is damaged"
                ) from None
            log.debug("%s: its decoder %s; trying once more", span, e)


def _ask(request: dict[str, Any]) -> Iterator[Message]:
    process, finished, memory = _take(), False, 0
    try:
        process.send(request)
        while not finished:
            head, body = process.receive()
            memory = head.get("memory", 0)
            finished = bool(head.get("done") or head.get("error"))
            if head.get("error"):
                if head.get("trace"):
                    log.debug("in the decoder:\n%s", head["trace"])
                raise PastEnd(head["error"], head["past"]) if "past" in head else UserError(head["error"])
            yield head, body
            if head.get("times"):
                process.send({"do": "more"})
    except GeneratorExit:  # the reader wants no more
        process.send({"do": "stop"})
        while not finished:
            head, _ = process.receive()
            memory, finished = head.get("memory", 0), bool(head.get("done") or head.get("error"))
        raise
    finally:
        if finished:
            _give_back(process, memory)
        else:
            process.end(kill=True)


# -------------------------------------------------------------------------------------------------- in the process


def _limit_seconds() -> None:
    """From now on the process has :data:`MOST_SECONDS` of processor time."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(time.process_time()) + MOST_SECONDS
    with contextlib.suppress(ValueError):  # a limit of the user's own
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _memory() -> int:
    """Bytes that this process occupies."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


class _Answers:
    """The connection to the command, as the readers of media use it."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.spoken = time.monotonic()

    def send(self, head: dict[str, Any], body: Any = b"") -> None:
        send(self.connection, head, body)
        self.spoken = time.monotonic()
        _limit_seconds()

    def wait(self) -> str:
        """What the command asks for next."""
        message = receive(self.connection)
        return message[0]["do"] if message else "stop"


def _sound(decoding: Any, answers: _Answers, span: MediaSpan, request: dict[str, Any]) -> dict[str, Any]:
    def put(samples: np.ndarray) -> None:
        answers.send({}, np.ascontiguousarray(samples, np.float32))

    return {"notes": decoding.read_sound(span, request["rate"], put, lambda: answers.send({"again": True}))}


def _pictures(decoding: Any, answers: _Answers, span: MediaSpan, request: dict[str, Any]) -> dict[str, Any]:
    times: list[float] = []
    batch: list[np.ndarray] = []
    notes: list[str] = []
    credit = _AHEAD

    def flush() -> bool:
        nonlocal credit
        while credit == 0:
            if answers.wait() == "stop":
                return False
            credit += 1
        answers.send({"times": times, "shape": batch[0].shape}, np.stack(batch))
        credit -= 1
        times.clear()
        batch.clear()
        return True

    def full(picture: np.ndarray) -> bool:
        return bool(batch) and (picture.shape != batch[0].shape or len(batch) * picture.nbytes >= _BATCH)

    pictures = decoding.read_pictures(span, request["fps"], notes)
    try:
        for at, picture in pictures:
            if full(picture) and not flush():
                return {}
            times.append(at)
            batch.append(picture)
    except UserError:
        if batch:  # the pictures before the damage
            flush()
        raise
    finally:
        pictures.close()
    if batch:
        flush()
    return {"notes": notes}


def _info(info: Any) -> dict[str, Any]:
    return {"info": [info.duration, info.has_audio, info.has_video]}


def _answer(decoding: Any, answers: _Answers, request: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked; gives the last answer."""
    from sdumc.data import streams

    path, start, end, utterance = request["span"]
    span = MediaSpan(path, start, end, utterance)
    try:
        os.chdir(request["cwd"])
        if request["do"] == "sound":
            result = _sound(decoding, answers, span, request)
        elif request["do"] == "pictures":
            result = _pictures(decoding, answers, span, request)
        elif request["do"] == "check":
            result = _info(decoding.check(span, request["audio"], request["video"]))
        elif request["do"] == "describe":
            result = {"contents": decoding.describe(span, request["most_seconds"])}
        else:
            result = _info(decoding.probe(span))
        return {"done": True, **result}
    except PastEnd as e:
        return {"error": str(e), "past": e.end}
    except UserError as e:
        streams.forget()
        return {"error": str(e)}
    except ConnectionError:
        raise
    except BlockingIOError:  # no thread to be had: not the file's fault, and another process may have more luck
        os._exit(os.EX_TEMPFAIL)
    except MemoryError:
        streams.forget()
        return {"error": f"{span}: needs more than {MOST_MEMORY >> 30} GB of memory to decode; convert the file"}
    except Exception as e:  # whatever PyAV does with a damaged file
        import traceback

        streams.forget()
        reason = f"{type(e).__name__}: {e}"
        text = f"{span}: cannot be decoded ({reason}); convert it, or copy or make it again if it is damaged"
        return {"error": text, "trace": traceback.format_exc()}


def serve(connection: socket.socket) -> None:
    """Answer requests until the command ends."""
    _limit_seconds()
    from sdumc.data import decoding

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MOST_MEMORY if hard == resource.RLIM_INFINITY else min(hard, MOST_MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    answers = _Answers(connection)
    while (message := receive(connection)) is not None:
        request = message[0]
        if request["do"] in ("more", "stop"):  # meant for the answer that was complete before it came
            continue
        _limit_seconds()
        answers.send({**_answer(decoding, answers, request), "memory": _memory()})


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError), socket.socket(fileno=int(sys.argv[1])) as own:
        serve(own)
    os._exit(0)  # without the destructors of FFmpeg
