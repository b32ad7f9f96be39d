"""Damaged media files, seeded: every one is read or refused in one line, in bounded time, and memory stays.

By hand, for as long as wanted: ``python tests/fuzz_media.py --minutes 60 [--seed N] [--keep DIR]``. The tests run a
fixed number of cases (tests/unit/test_media_strange.py). Each case is a file of one of a dozen containers, made here or
real where there are recordings, in which bytes of the header or of the body are changed, left out, doubled or zeroed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/unit")]

import sdumc  # noqa: E402, F401 (first: it says how threads wait)
from sdumc.data import worker  # noqa: E402
from sdumc.data.media import check_media_file, probe, read_frames, read_sound  # noqa: E402
from sdumc.data.tables import MediaSpan  # noqa: E402
from sdumc.errors import UserError  # noqa: E402

KINDS = ("wav", "mp4", "mkv", "ts", "mpg", "flv", "avi", "wmv", "mp3", "opus", "flac", "amr", "oga", "ima.wav")
MOST_SECONDS = 300  # of waiting for one read, on any machine


def originals(folder: Path) -> dict[str, bytes]:
    """A whole file of each kind, and the real recordings that there are."""
    import soundfile
    from helpers.shared import MEDIA
    from test_media_strange import CONTAINERS, mono, voice, write

    found = {}
    for name in KINDS:
        path = folder / f"x.{name}"
        if name in ("wav", "flac"):
            soundfile.write(path, voice(2.0), 16000)
        else:
            container, codec, pictures = CONTAINERS[name]
            write(path, container, [mono(codec, 2.0)], pictures=20 * pictures)
        found[name] = path.read_bytes()
    if MEDIA.is_dir():
        found["real.mpg"] = (MEDIA / "bbaf2n.mpg").read_bytes()
    return found


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three damages, half of them in the first bytes, where headers are."""
    raw = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        reach = min(len(raw), 600) if rng.random() < 0.5 else len(raw)
        at = int(rng.integers(0, max(reach, 1)))
        length = int(min(2 ** rng.integers(0, 13), max(len(raw) - at, 1)))
        kind = rng.integers(0, 6)
        if kind == 0:
            raw[at : at + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif kind == 1:
            raw[at : at + length] = b""
        elif kind == 2:
            raw[at:at] = raw[at : at + length]
        elif kind == 3:
            raw[at : at + length] = bytes(length)
        elif kind == 4:
            raw[at : at + 4] = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1")[rng.integers(0, 3)]
        else:
            for place in rng.integers(0, max(len(raw), 1), 16):
                raw[place : place + 1] = bytes([int(rng.integers(0, 256))])
    return bytes(raw)


def readings(path: Path):
    """Every way in which the project reads a file."""
    yield "sound", lambda: read_sound(path)
    yield "pictures", lambda: sum(1 for _, _ in zip(read_frames(path, 5), range(200), strict=False))
    yield "segment", lambda: read_sound(MediaSpan(str(path), 1.2, 1.6))
    yield "check", lambda: check_media_file(path)
    yield "probe", lambda: probe(path)


def memory() -> int:
    """Bytes of this process and of those that decode."""
    total = 0
    for pid in ["self", *(p.process.pid for p in worker._idle)]:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return total


class Fuzz:
    """The cases of a seed, one after the other."""

    def __init__(self, seed: int, folder: Path, keep: Path | None = None):
        self.folder, self.keep = folder, keep
        self.rng = np.random.default_rng(seed)
        self.files = originals(folder)
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.cases = 0

    def case(self) -> None:
        """Damage a file and read it; what should not be is a line in ``wrong``."""
        names = list(self.files)
        name = names[self.cases % len(names)]
        self.cases += 1
        path = self.folder / f"case{self.cases}.{name.rpartition('.')[2]}"
        path.write_bytes(damage(self.files[name], self.rng))
        bad = False
        for what, read in readings(path):
            begin = time.monotonic()
            try:
                read()
                self.counts["read"] += 1
            except UserError as e:
                self.counts["refused"] += 1
                self.counts["decoder ended"] += "its decoder" in str(e)
                self.counts["unforeseen"] += "cannot be decoded (" in str(e)
                bad |= self._check(len(str(e).splitlines()) == 1, f"{path.name} {what}: several lines: {e}")
            except Exception as e:
                bad |= self._check(False, f"{path.name} {what}: {type(e).__name__}: {e}")
            took = time.monotonic() - begin
            bad |= self._check(took < MOST_SECONDS, f"{path.name} {what}: took {took:.0f} s")
        if bad and self.keep:
            self.keep.mkdir(parents=True, exist_ok=True)
            path.rename(self.keep / path.name)
        path.unlink(missing_ok=True)

    def _check(self, right: bool, text: str) -> bool:
        if not right:
            self.wrong.append(text)
        return not right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files on which something went wrong")
    args = parser.parse_args()
    end, said = time.monotonic() + 60 * args.minutes, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(args.seed, Path(folder), args.keep)
        while time.monotonic() < end:
            fuzz.case()
            if time.monotonic() - said > 30:
                said = time.monotonic()
                print(f"{fuzz.cases} files, {dict(fuzz.counts)}, {memory() >> 20} MB", flush=True)
        print(f"{fuzz.cases} files, {dict(fuzz.counts)}, {memory() >> 20} MB at the end")
    for line in fuzz.wrong:
        print(f"wrong: {line}")
    return 1 if fuzz.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
