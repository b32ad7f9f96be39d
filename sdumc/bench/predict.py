"""Where the time of `sdumc predict` goes: start-up with one clip, many clips, an hour of sound; and its memory.

Each is the command itself in a process of its own. Processor time is what the system counts for it and for the process
that decodes; on a busy machine it says more than the clock.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdumc.bench.measure import goal, median, spread, table
from sdumc.errors import UserError

FEW = 50  # clips, of which the others are told apart


@dataclass(frozen=True)
class Cost:
    """What a command took: seconds on the clock and of processors, and its largest memory in MiB."""

    clock: float
    processor: float
    memory: float


def cost(words: Sequence[str]) -> Cost:
    """Run ``sdumc predict`` with these words.

    Raises:
        UserError: it failed.
    """
    start = time.perf_counter()
    command = [sys.executable, "-m", "sdumc.bin.predict", "--json", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(
            f"`sdumc predict {' '.join(words)}` ended with {process.returncode}; what is wrong stands above"
        )
    return Cost(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def main(repeats: int, exp_dir: str | None, clip: str | None, clips: int, minutes: float) -> bool:
    """Print the costs of a model, with copies of a clip; without either, what is needed."""
    if not exp_dir or not clip:
        print("Not measured: needs --exp-dir, a trained model's folder, and --clip, a recording of some seconds.")
        return True
    import soundfile

    from sdumc.data.media import read_audio

    wave = read_audio(clip)
    seconds = len(wave) / 16000
    rows = []
    with tempfile.TemporaryDirectory(prefix="sdumc-bench-") as scratch:
        folder = Path(scratch)
        model = ["--exp-dir", exp_dir]
        cost([*model, clip])  # fills the caches
        ones = [cost([*model, clip]) for _ in range(min(repeats, 5))]
        rows.append(_row(f"one clip of {seconds:.1f} s", ones, seconds))
        many = {}
        for count in (min(FEW, clips), clips):
            (folder / str(count)).mkdir()
            for i in range(count):
                os.symlink(os.path.abspath(clip), folder / str(count) / f"{i:06d}{Path(clip).suffix.lower()}")
            many[count] = cost([*model, str(folder / str(count))])
            rows.append(_row(f"{count} such clips", [many[count]], seconds * count))
        times = max(round(60 * minutes / (seconds + 0.6)), 1)
        pause = np.zeros(9600, np.float32)
        soundfile.write(folder / "long.wav", np.tile(np.concatenate([wave, pause]), times), 16000)
        length = times * (seconds + 0.6)
        try:
            rows.append(_row(f"{length / 60:.0f} minutes of sound", [cost([*model, str(folder / "long.wav")])], length))
        except UserError:
            print("The long recording is not measured; give a clip in which somebody speaks for all of it.\n")
    print(table(["what", "clock (s)", "processor (s)", "processor (share of its length)", "memory (MiB)"], rows))
    few, all_of_them = many[min(FEW, clips)], many[clips]
    if clips > FEW:
        each = (all_of_them.processor - few.processor) / (clips - FEW)
        print(f"\nA further clip takes {1000 * each:.0f} ms of processor time.")
    return goal(f"memory of {clips} clips over that of {min(FEW, clips)}", all_of_them.memory / few.memory, most=1.1)


def _row(what: str, costs: Sequence[Cost], seconds: float) -> list[str]:
    clock, processor = [c.clock for c in costs], [c.processor for c in costs]
    several = len(costs) > 1
    return [
        what,
        f"{median(clock):.1f}" + (f" ({spread(clock)})" if several else ""),
        f"{median(processor):.1f}" + (f" ({spread(processor)})" if several else ""),
        f"{median(processor) / seconds:.3f}",
        f"{max(c.memory for c in costs):.0f}",
    ]
