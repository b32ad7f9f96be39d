"""The server of ``sdumc demo``: a page on the loopback address on which clips are dropped, and that shows their page.

It is made of Starlette on uvicorn: two small packages that serve what they are told to and nothing else. What keeps a
visitor, or a page on the web that a visitor has open, from other files of the machine:

* There is no address that names a file: a clip is the body of a request, its answer a page in memory.
* A clip must be of a format of :data:`FORMATS`. Play lists and the like, which FFmpeg would follow to other files, are
  not in it.
* Requests must name the loopback address as their host (a page elsewhere could have its name resolve to it), and those
  that change something must have a header that other sites cannot send. Answers are found by random names only.
"""

from __future__ import annotations

import fcntl
import html
import logging
import os
import queue
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from sdumc.data.media import describe
from sdumc.errors import UserError
from sdumc.prediction.clip_page import make_clip, page_html
from sdumc.prediction.inputs import SOUND, VIDEO
from sdumc.prediction.scorer import ScoredFile
from sdumc.reporting.report import templates

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger("sdumc")

HOST = "127.0.0.1"
HEADER = "x-sdumc-name"  # the name of the file, percent-encoded
TEXT_HEADER = "x-sdumc-text-bytes"  # so many bytes of transcript stand before the clip
MOST_TEXT = 100_000  # bytes
# FFmpeg's names of the formats that are single files. Not there: those that name others (hls, dash, concat, sdp ...).
FORMATS = (
    *(
        "aac",
        "ac3",
        "aiff",
        "amr",
        "amrnb",
        "amrwb",
        "ape",
        "asf",
        "au",
        "avi",
        "caf",
        "dts",
        "dv",
        "eac3",
        "flac",
        "flv",
    ),
    *("h264", "hevc", "ivf", "m4v", "matroska", "mov", "mp3", "mpeg", "mpegts", "mpegvideo", "mxf", "nut", "ogg", "rm"),
    *("tta", "voc", "w64", "wav", "webm", "wv"),
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_BUSY = "too many clips are waiting; try again when some are done"

# The file, its transcript if one was typed, and what is told of progress.
Score = Callable[[Path, str | None, Callable[[int, int], None]], ScoredFile]


@dataclass(frozen=True)
class Limits:
    """``megabytes`` and ``seconds`` of a clip, clips ``waiting`` at once, answers ``kept`` (the latest)."""

    megabytes: float = 200
    seconds: float = 600
    waiting: int = 8
    kept: int = 8


@dataclass
class Job:
    """A clip that was dropped, and what became of it; ``state`` is waiting, running, done, failed or cancelled."""

    name: str  # as the visitor has it; never used as a path
    path: Path
    text: str | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    state: str = "waiting"
    done: int = 0
    total: int = 0
    message: str = ""
    page: str = ""


class _Cancelled(Exception):
    pass


class Jobs:
    """Scores the clips one at a time, in a thread, in the order in which they came."""

    def __init__(self, score: Score, folder: Path, limits: Limits):
        self.score, self.folder, self.limits = score, folder, limits
        self.found: dict[str, Job] = {}
        self.coming = 0  # clips that are being sent
        self._queue: queue.Queue[Job] = queue.Queue()
        threading.Thread(target=self._work, daemon=True, name="scoring").start()

    @property
    def full(self) -> bool:
        return self.coming + sum(j.state in ("waiting", "running") for j in self.found.values()) >= self.limits.waiting

    def new_path(self, name: str) -> Path:
        """Where to write a clip: a random name, with the ending of its own if that is one of sound or video."""
        ending = Path(name).suffix.lower()
        return self.folder / (secrets.token_hex(8) + (ending if ending in (*SOUND, *VIDEO) else ""))

    def add(self, job: Job) -> None:
        self.found[job.id] = job
        for states, kept in ((("done",), self.limits.kept), (("failed", "cancelled"), 100)):
            ended = [j.id for j in self.found.values() if j.state in states]
            for old in ended[: max(len(ended) - kept, 0)]:
                del self.found[old]
        self._queue.put(job)

    def ahead(self, job: Job) -> int:
        """How many clips are scored before this one."""
        order = list(self.found.values())
        return sum(j.state in ("waiting", "running") for j in order[: order.index(job)])

    def cancel(self, job: Job) -> None:
        if job.state in ("waiting", "running"):
            job.state = "cancelled"
        job.page = ""

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            state, text = "cancelled", ""
            if job.state == "waiting":
                job.state = "running"
                state, text = self._run(job)
            job.path.unlink(missing_ok=True)  # before anybody is told that the job has ended
            if job.state == "running":
                job.page, job.message = (text, "") if state == "done" else ("", text)
                job.state = state

    def _run(self, job: Job) -> tuple[str, str]:
        """The state in which a job ends, and its page or the reason."""

        def progress(done: int, total: int) -> None:
            if job.state == "cancelled":
                raise _Cancelled
            job.done, job.total = done, total

        try:
            check_clip(job.path, self.limits.seconds)
            scored = self.score(job.path, job.text, progress)
            progress(job.total, job.total)
            page = page_html([make_clip(scored, None, name=job.name)])
            return "done", page.replace(str(job.path), html.escape(job.name))
        except _Cancelled:
            return "cancelled", ""
        except UserError as e:
            return "failed", str(e).replace(str(job.path), job.name)
        except Exception:  # the server and the other clips go on
            log.exception("scoring %s failed", job.name)
            return "failed", f"{job.name}: a fault of this program; the terminal has the details"


def check_clip(path: Path, seconds: float) -> None:
    """Refuse what is not a single media file, or is longer than ``seconds`` by the times of its packets.

    Raises:
        UserError: it is.
    """
    found = describe(path, seconds)
    if not set(found.format.split(",")) & set(FORMATS):
        raise UserError(f"{path}: {found.format} files are not taken here; convert it, or use sdumc predict")
    if found.seconds > seconds:
        raise UserError(f"{path}: longer than {seconds:g} s, which is the most here; cut it, or use sdumc predict")


def make_app(jobs: Jobs, title: str) -> Starlette:
    """The page, and the three things that its script asks for."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    page = (
        templates(Path(__file__).parent)
        .get_template("demo.html")
        .render(title=title, limits=jobs.limits, header=HEADER, text_header=TEXT_HEADER, most_text=MOST_TEXT)
    )

    async def index(request: Request) -> Response:
        policy = f"{_POLICY}connect-src 'self'; frame-src 'self'; frame-ancestors 'none'; base-uri 'none'"
        return HTMLResponse(page, headers={**_HEADERS, "Content-Security-Policy": policy})

    async def drop(request: Request) -> Response:
        name = _name(request.headers.get(HEADER))
        if not name or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return JSONResponse({"error": "not from this page"}, 403, _HEADERS)
        if not 0 <= _number(request.headers.get(TEXT_HEADER, "0")) <= MOST_TEXT:
            return JSONResponse({"error": f"{name}: its transcript is longer than {MOST_TEXT} bytes"}, 413, _HEADERS)
        if jobs.full:
            return JSONResponse({"error": _BUSY}, 503, _HEADERS)
        job = Job(name, jobs.new_path(name))
        try:
            if not await _receive(request, jobs, job):
                return JSONResponse({"error": f"{name}: larger than {jobs.limits.megabytes:g} MB"}, 413, _HEADERS)
        except BaseException:  # the visitor is gone, or the disk is full
            job.path.unlink(missing_ok=True)
            raise
        jobs.add(job)
        return JSONResponse({"job": job.id}, 201, _HEADERS)

    async def state(request: Request) -> Response:
        if (job := jobs.found.get(request.path_params["id"])) is None:
            return JSONResponse({"error": "no such clip"}, 404, _HEADERS)
        if request.method == "DELETE":
            jobs.cancel(job)
        values = {"state": job.state, "done": job.done, "total": job.total, "message": job.message}
        return JSONResponse({**values, "ahead": jobs.ahead(job)}, headers=_HEADERS)

    async def answer(request: Request) -> Response:
        job = jobs.found.get(request.path_params["id"])
        if job is None or not job.page:
            return HTMLResponse("no such page", 404, _HEADERS)
        policy = f"{_POLICY}media-src data: blob:; frame-ancestors 'self'; sandbox allow-scripts"
        return HTMLResponse(job.page, headers={**_HEADERS, "Content-Security-Policy": policy})

    routes = [
        Route("/", index),
        Route("/clips", drop, methods=["POST"]),
        Route("/clips/{id}", state, methods=["GET", "DELETE"]),
        Route("/clips/{id}/page", answer),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])])


def _name(given: str | None) -> str:
    """The last part of a file's name, without what cannot be printed; empty if there is none."""
    name = unquote(given or "").replace("\\", "/").rstrip("/").rpartition("/")[2]
    return "".join(c for c in name if c.isprintable())[:200]


def _number(text: str) -> int:
    """A number of bytes; -1 if it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else -1


async def _receive(request: Request, jobs: Jobs, job: Job) -> bool:
    """Write the clip in the body of a request to its file, and take the text before it; False, and no file, if the
    clip is larger than the limit."""
    most = jobs.limits.megabytes * 1e6
    left = _number(request.headers.get(TEXT_HEADER, "0"))
    jobs.coming += 1
    size, text = 0, bytearray()
    try:
        with open(job.path, "xb") as f:
            async for chunk in request.stream():
                text += chunk[:left]
                chunk, left = chunk[left:], max(left - len(chunk), 0)
                size += len(chunk)
                if size > most:
                    break
                f.write(chunk)
    finally:
        jobs.coming -= 1
    job.text = text.decode("utf-8", "replace").strip() or None
    if size > most:
        job.path.unlink()
    return size <= most


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder for the clips, which is removed at the end; those that killed servers have left are removed now."""
    for old in Path(tempfile.gettempdir()).glob("sdumc-demo-*/lock"):
        if old.parent.is_symlink() or old.parent.stat().st_uid != os.getuid():
            continue
        with open(old) as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another server is at work there
                continue
            shutil.rmtree(old.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="sdumc-demo-"))
    try:
        with open(folder / "lock", "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def listen(port: int) -> socket.socket:
    """A socket on the loopback address; port 0: any that is free.

    Raises:
        UserError: the port is taken.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen()  # who comes before the server has started waits for it
    except OSError as e:
        found.close()
        raise UserError(
            f"port {port} cannot be used ({e.strerror}); give another one with --port, or 0 for any"
        ) from None
    return found


def make_server(app: Starlette) -> uvicorn.Server:
    """The server; its ``run(sockets=[...])`` ends when the process is told to stop."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http="h11",
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)
