"""Chromium, where there is one; as a program: its name or exit code 1.

A :class:`Tab` is driven through the browser's own protocol (Chrome DevTools), over a pipe.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The first that starts: on some systems a name only tells how to install it."""
    for program in filter(None, map(shutil.which, NAMES)):
        try:
            if subprocess.run([program, "--version"], capture_output=True, timeout=300).returncode == 0:
                return program
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


# What chromium does of itself, such as looking for updates, takes time and needs a network.
QUIET = ["quic", "background-networking", "component-update", "sync", "gpu", "breakpad", "extensions"]


class Tab:
    """A page in a browser without a window: a context manager.

    ``requests`` has the addresses that the page asked for, ``problems`` what it logged as errors or threw.
    """

    def __init__(self, program: str, profile: Path, width: int = 1280, height: int = 900, dark: bool = False):
        there, here = os.pipe(), os.pipe()
        command = [program, "--headless", "--no-sandbox", "--no-first-run", "--remote-debugging-pipe"]
        command += [f"--disable-{what}" for what in QUIET] + [f"--user-data-dir={profile}", "about:blank"]
        wanted = {3: there[0], 4: here[1]}  # the protocol's own file descriptors
        high = {fd: os.dup2(source, 200 + fd) for fd, source in wanted.items()}
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec 3<&{high[3]} 4>&{high[4]}; exec "$@"', "bash", *command],
            pass_fds=high.values(),
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C.UTF-8"},  # in the C locale a dropped file with an é in its name is no file
        )
        for fd in (*wanted.values(), *high.values()):
            os.close(fd)
        self._to, self._from = os.fdopen(there[1], "wb", 0), os.fdopen(here[0], "rb", 0)
        self._number, self._rest = 0, b""
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._session: str | None = None
        targets = self("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._to.close()
        self._from.close()

    def __call__(self, method: str, **params: Any) -> Any:
        """One call of the protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = self._from.read(1 << 20)
                assert part, "the browser has ended"
                self._rest += part
            text, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._event(answer.get("method", ""), answer.get("params", {}))

    def _event(self, name: str, params: dict) -> None:
        if name == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif name == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])

    def open(self, address: str) -> None:
        """Go to an address and wait until the page is there."""
        self("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression: str) -> Any:
        """The value of an expression, as JSON has it."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 300) -> Any:
        """The value of the expression as soon as it is true; the time is a guard against waiting for ever."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            if time.monotonic() > end:
                shown = self.js("document.body.innerText.slice(0, 1000)")
                raise AssertionError(f"not in {seconds} s: {expression}; {self.problems}; the page shows: {shown}")
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        x, y, hit = self.js(
            f"(e => {{ e.scrollIntoView({{block: 'end'}}); const b = e.getBoundingClientRect(), "
            f"x = b.left + b.width / 2, y = b.top + b.height / 2, at = document.elementFromPoint(x, y); "
            f"return [x, y, e.contains(at)]; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        assert hit, f"{selector} is covered"
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key: str, text: str = "") -> None:
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        code = codes.get(key, ord(key[0].upper()))
        self("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, text=text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def drop(self, selector: str, *files: Path) -> None:
        """Drop files on an element, as from a file manager."""
        x, y = self.js(
            f"(b => [b.left + b.width / 2, b.top + b.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        # A page that has just been loaded may not take part in dragging yet: again until it has seen the drop, and let
        # it see one only.
        self.js(
            "if (!('drops' in window)) addEventListener('drop', e => { if (window.drops++) "
            "{ e.preventDefault(); e.stopImmediatePropagation(); } }, true); window.drops = 0"
        )
        data = {"items": [], "files": [str(f) for f in files], "dragOperationsMask": 1}
        for _ in range(100):
            for kind in ("dragEnter", "dragOver", "drop"):
                self("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
            for _ in range(30):
                if self.js("window.drops"):
                    return
                time.sleep(0.1)
        raise AssertionError(f"{selector} has seen no drop")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=False)["data"]))

    def pdf(self) -> bytes:
        return base64.b64decode(self("Page.printToPDF", printBackground=False)["data"])


if __name__ == "__main__":
    found = find_browser()
    print(found or "")
    sys.exit(found is None)
