"""The server of `sdumc demo`: clips, limits, one at a time, and that nobody reads another file of the machine."""

from __future__ import annotations

import http.client
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import av
import numpy as np
import pytest
import soundfile
from helpers.browser import Tab, find_browser
from helpers.stopping import wait_until

from sdumc.data.media import read_audio
from sdumc.errors import UserError
from sdumc.prediction import demo
from sdumc.prediction.scorer import ScoredFile, ScoredUtterance


@dataclass
class Site:
    """A running server with a scorer that says +1.25, and waits where ``gate`` is closed."""

    jobs: demo.Jobs
    port: int
    gate: threading.Event
    asked: list[str] = field(default_factory=list)
    said: list[str | None] = field(default_factory=list)

    def call(self, method: str, path: str, body=None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        """One request as it stands: no address is made plain on the way."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
        if isinstance(body, bytes):
            headers.setdefault("content-length", str(len(body)))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        if isinstance(body, bytes):
            connection.send(body)
        reply = connection.getresponse()
        return reply.status, reply.read(), {k.lower(): v for k, v in reply.getheaders()}

    def drop(self, content: bytes, name: str = "a.wav") -> str:
        status, body, _ = self.call("POST", "/clips", content, x_sdumc_name=quote(name))
        assert status == 201, body
        return json.loads(body)["job"]

    def state(self, job: str) -> dict:
        return json.loads(self.call("GET", f"/clips/{job}")[1])

    def ended(self, job: str) -> dict:
        wait_until(lambda: self.state(job)["state"] not in ("waiting", "running"))
        return self.state(job)

    @property
    def files(self) -> list[str]:
        return sorted(p.name for p in self.jobs.folder.iterdir() if p.name != "lock")


def serve(**limits: float) -> Iterator[Site]:
    gate = threading.Event()
    gate.set()

    def score(path: Path, text: str | None, progress) -> ScoredFile:
        site.asked.append(path.name)
        site.said.append(text)
        progress(0, 2)
        assert gate.wait(300)
        progress(1, 2)
        u = ScoredUtterance(0.0, 1.0, 1.25, "quite good", ("audio", "text"), "simulated", "ok")
        return ScoredFile(str(path), 1.0, 1.25, [u], [f"{path} was looked at"])

    with demo.workplace() as folder:
        at = demo.listen(0)
        jobs = demo.Jobs(score, folder, demo.Limits(**limits))
        server = demo.make_server(demo.make_app(jobs, "Model: <tiny>"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        wait_until(lambda: server.started)
        site = Site(jobs, at.getsockname()[1], gate)
        yield site
        gate.set()
        server.should_exit = True
        thread.join(300)
    assert not folder.exists()


@pytest.fixture
def site():
    yield from serve()


@pytest.fixture
def small():
    yield from serve(megabytes=0.1, seconds=2, waiting=2, kept=1)


def sound(seconds: float = 1.0) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        wave = np.sin(np.arange(round(8000 * seconds)) / 5) / 3
        soundfile.write(f"{folder}/a.wav", wave, 8000)
        return Path(f"{folder}/a.wav").read_bytes()


def test_a_clip_gives_its_page(site):
    job = site.drop(sound(), "dir/my <i>clip.wav")
    assert site.ended(job)["state"] == "done"
    status, page, headers = site.call("GET", f"/clips/{job}/page")
    text = page.decode()
    assert status == 200 and "<h1>my &lt;i&gt;clip.wav</h1>" in text and "+1.25" in text and "data:audio/wav" in text
    assert "my &lt;i&gt;clip.wav was looked at" in text and "<i>clip" not in text and str(site.jobs.folder) not in text
    assert "sandbox allow-scripts" in headers["content-security-policy"]
    assert site.files == []


def test_a_transcript_stands_before_the_clip(site):
    text, clip = "sehr schön, \U0001f600\nwirklich", sound()
    for words in (text, "  \n ", ""):
        encoded = words.encode()
        status, body, _ = site.call(
            "POST", "/clips", encoded + clip, x_sdumc_name="a.wav", x_sdumc_text_bytes=str(len(encoded))
        )
        assert status == 201 and site.ended(json.loads(body)["job"])["state"] == "done"
    assert site.said == [text, None, None]


@pytest.mark.parametrize("count", ["100001", "-1", "1e3", "x", "9" * 5000])
def test_a_transcript_of_another_length_is_refused(site, count):
    status, body, _ = site.call("POST", "/clips", sound(), x_sdumc_name="a.wav", x_sdumc_text_bytes=count)
    assert status == 413 and "transcript" in json.loads(body)["error"]
    assert site.files == [] and site.asked == []


def test_a_broken_file_is_an_error_with_its_name(site):
    found = site.ended(site.drop(b"not a film" * 100, "holiday.mp4"))
    assert found["state"] == "failed" and found["message"].startswith("holiday.mp4: not a readable media file")
    assert site.files == [] and site.asked == []


def test_a_fault_of_the_program_is_none_of_the_server(site, monkeypatch):
    monkeypatch.setattr(site.jobs, "score", lambda path, progress: 1 / 0)
    found = site.ended(site.drop(sound()))
    assert found["state"] == "failed" and "a fault of this program" in found["message"]
    monkeypatch.undo()
    assert site.ended(site.drop(sound()))["state"] == "done"


def test_large_and_long_clips_are_refused(small):
    status, body, _ = small.call("POST", "/clips", bytes(200_000), x_sdumc_name="a.wav")
    assert status == 413 and b"a.wav: larger than 0.1 MB" in body
    parts = b"".join(b"%x\r\n%s\r\n" % (50_000, bytes(50_000)) for _ in range(4))  # the length is not said beforehand
    with socket.create_connection(("127.0.0.1", small.port), timeout=300) as raw:
        raw.sendall(
            b"POST /clips HTTP/1.1\r\nHost: localhost\r\nX-Sdumc-Name: a.wav\r\nTransfer-Encoding: chunked\r\n\r\n"
            + parts
        )
        assert b"413" in raw.recv(1000).split(b"\r\n")[0]
    assert small.files == []
    found = small.ended(small.drop(sound(3)))
    assert found["state"] == "failed" and "a.wav: longer than 2 s" in found["message"] and small.asked == []


def test_a_clip_that_is_not_sent_to_its_end_leaves_nothing(site):
    with socket.create_connection(("127.0.0.1", site.port), timeout=300) as raw:
        raw.sendall(b"POST /clips HTTP/1.1\r\nHost: localhost\r\nX-Sdumc-Name: a.wav\r\nContent-Length: 999\r\n\r\nabc")
        wait_until(lambda: site.files != [])
    wait_until(lambda: site.files == [] and site.jobs.coming == 0)
    assert site.jobs.found == {}


def test_one_at_a_time_in_order(small):
    small.gate.clear()
    first, second = small.drop(sound()), small.drop(sound())
    wait_until(lambda: small.state(first)["total"] == 2)
    assert small.state(first)["state"] == "running" and small.state(first)["ahead"] == 0
    assert small.state(second)["state"] == "waiting" and small.state(second)["ahead"] == 1
    status, body, _ = small.call("POST", "/clips", sound(), x_sdumc_name="a.wav")
    assert status == 503 and b"too many clips are waiting" in body
    assert len(small.asked) == 1
    small.gate.set()
    assert small.ended(second)["state"] == "done" and len(small.asked) == 2
    for _ in range(2):  # when a clip comes, all answers but the latest are forgotten
        small.ended(small.drop(sound()))
    assert small.call("GET", f"/clips/{first}/page")[0] == 404


def test_cancel(site):
    site.gate.clear()
    first, second = site.drop(sound()), site.drop(sound())
    wait_until(lambda: site.state(first)["total"] == 2)
    for job in (first, second):
        assert json.loads(site.call("DELETE", f"/clips/{job}")[1])["state"] == "cancelled"
    site.gate.set()
    third = site.drop(sound())
    assert site.ended(third)["state"] == "done" and len(site.asked) == 2
    assert site.call("GET", f"/clips/{first}/page")[0] == 404 and site.files == []


# ------------------------------------------------------------------------------------------- other files of the machine

PLACES = [
    "/../../../../etc/passwd",
    "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/etc/passwd",
    "/file=/etc/passwd",
    "/gradio_api/file=/etc/passwd",
    "/file/etc/passwd",
    "/static/../../../etc/passwd",
    "/clips/../../../etc/passwd",
    "/clips/..%2f..%2f..%2fetc%2fpasswd",
    "/clips/%2Fetc%2Fpasswd/page",
    "/clips//etc/passwd/page",
    "/clips/%00/page",
    "http://127.0.0.1/etc/passwd",
    "file:///etc/passwd",
    "/docs",
    "/openapi.json",
]


def test_no_address_leads_to_a_file(site):
    for place in PLACES:
        for method in ("GET", "POST", "PUT", "HEAD"):
            status, body, _ = site.call(method, place, b"" if method in ("POST", "PUT") else None)
            assert status in (400, 404, 405) and b"root:" not in body, (method, place)


def test_the_name_of_a_clip_is_no_path(site):
    secret = site.jobs.folder.parent / "sdumc-secret.wav"
    for name in (f"../{secret.name}", str(secret), "..\\..\\x.wav", "%2e%2e/x.wav", "a\0b\n.wav", "x" * 5000 + ".wav"):
        job = site.drop(sound(), name)
        assert site.ended(job)["state"] == "done"
        assert "/" not in site.jobs.found[job].name and site.jobs.found[job].path.parent == site.jobs.folder
    assert not secret.exists()
    assert site.call("POST", "/clips", sound(), x_sdumc_name=quote("../"))[0] in (201, 403)


def test_a_list_of_files_is_no_clip(site, tmp_path):
    """FFmpeg follows such lists to any file that the server's user may read."""
    private = tmp_path / "private.mp3"
    soundfile.write(private, np.sin(np.arange(16000) / 5) / 3, 8000)
    lists = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{private}\n#EXT-X-ENDLIST\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile '{private}'\n",
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 96\n",
        "list.mpd": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'><Period>"
        f"<AdaptationSet><Representation id='1'><BaseURL>{private}</BaseURL></Representation></AdaptationSet>"
        "</Period></MPD>",
    }
    followed = []
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        for ending in ("", ".mp4", ".ts"):
            found = site.ended(site.drop(text.encode(), name + ending))
            assert found["state"] == "failed", name
            reasons = ("a play list", "not a readable media file", "are not taken here")
            assert any(reason in found["message"] for reason in reasons)
        with pytest.raises(UserError):
            read_audio(tmp_path / name)  # nor for sdumc predict
        try:
            av.open(str(tmp_path / name)).close()
            followed.append(name)
        except (av.error.FFmpegError, OSError):
            pass
    assert followed  # or this test would show nothing
    assert site.asked == []


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "192.168.1.2"])
def test_another_name_of_the_host_is_refused(site, host):
    """A page elsewhere can have its name resolve to 127.0.0.1; the browser then sends that name."""
    job = site.drop(sound())
    site.ended(job)
    for path in ("/", f"/clips/{job}", f"/clips/{job}/page"):
        assert site.call("GET", path, host=host)[0] == 400
    assert site.call("POST", "/clips", sound(), host=host, x_sdumc_name="a.wav")[0] == 400
    assert site.call("GET", "/", host=f"localhost:{site.port}")[0] == 200


def test_a_page_elsewhere_cannot_send_clips(site):
    """What a form elsewhere can send has not our header; a script would have to ask before, and is not allowed."""
    assert site.call("POST", "/clips", sound(), content_type="text/plain", origin="https://evil.example")[0] == 403
    assert site.call("POST", "/clips", sound(), x_sdumc_name="a.wav", sec_fetch_site="cross-site")[0] == 403
    status, _, headers = site.call(
        "OPTIONS", "/clips", origin="https://evil.example", access_control_request_method="POST"
    )
    assert status >= 400 and not any(name.startswith("access-control") for name in headers)
    assert site.jobs.found == {}


def test_nobody_else_can_reach_it(site):
    assert demo.HOST == "127.0.0.1"
    other = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with other, pytest.raises(OSError):
        other.connect(("127.0.0.2", site.port))  # loopback too, but not the address that is listened at
    assert b"<tiny>" not in site.call("GET", "/")[1]  # the model's path is text, not markup


def test_a_port_that_is_taken(site):
    with pytest.raises(UserError, match=r"port \d+ cannot be used .*--port"):
        demo.listen(site.port)


def test_folders_that_killed_servers_left_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "sdumc-demo-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "clip.mp4").write_text("x")
    with demo.workplace() as first, demo.workplace() as second:
        assert not left.exists() and first.is_dir() and first != second
        assert oct(os.stat(first).st_mode & 0o777) == "0o700"
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_said(monkeypatch):
    from sdumc.bin import demo as command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--extras demo"):
        command.main(["--exp-dir", "x"])


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.mark.slow
@pytest.mark.browser
def test_dropping_clips_in_a_browser(small, tmp_path):
    program = find_browser()
    if program is None:
        pytest.skip("no chromium; `tests/run.sh --with-browser` gets it")
    (tmp_path / "good clip é.wav").write_bytes(sound())
    (tmp_path / "broken.mp4").write_bytes(b"nothing" * 99)
    (tmp_path / "large.wav").write_bytes(bytes(200_000))
    here = f"http://127.0.0.1:{small.port}"
    with Tab(program, tmp_path / "profile") as tab:
        tab.open(here)
        tab.js("document.getElementById('words').value = ' sehr schön '")
        tab.drop("#drop", tmp_path / "good clip é.wav")
        tab.wait("!document.getElementById('answer').hidden")
        assert tab.js("document.getElementById('status').textContent") == "good clip é.wav: done"
        answer = tab.js("document.getElementById('open').href")
        assert tab.js("document.getElementById('save').download") == "good clip é.html"
        assert small.said == ["sehr schön"]
        tab.drop("#drop", tmp_path / "broken.mp4")
        said = tab.wait("document.getElementById('error').textContent")
        assert said.startswith("broken.mp4: not a readable media file")
        assert tab.js("document.getElementById('answer').hidden")
        tab.drop("#drop", tmp_path / "large.wav")
        tab.wait("document.getElementById('error').textContent.startsWith('large.wav: larger than')")
        # Progress and cancelling, by keyboard.
        small.gate.clear()
        tab.drop("#drop", tmp_path / "good clip é.wav")
        tab.wait("document.getElementById('status').textContent.includes('utterance 0 of 2')")
        tab.js("document.getElementById('cancel').focus()")
        tab.key("Enter", "\r")
        tab.wait("document.getElementById('error').textContent === 'cancelled'")
        small.gate.set()
        assert {r.partition("/clips")[0].rstrip("/") for r in tab.requests if not r.startswith("data:")} <= {here}
        assert not tab.problems
        # Which a broken clip after it has not removed; it plays, cut off from everything else.
        tab.open(answer)
        tab.wait("document.querySelector('audio').readyState >= 2")
        assert tab.js("document.querySelector('.overall b').textContent") == "+1.25"
        assert tab.js("self.origin") == "null" and not tab.problems
