"""What other busy processes on the machine cost, with OpenMP's own way of waiting and with ours.

OpenMP's threads spin for some milliseconds where they wait for each other. Beside a busy process, the thread that is
waited for may not be running, and the one that spins holds the core that it could run on. `sdumc/__init__.py` lets
them sleep sooner. Both ways are measured in one run, alone and beside one and two processes that do nothing but count.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO

from sdumc import WAITING_NAMES
from sdumc.bench.measure import goal, median, ratio, table

# OpenMP's own way: the runtimes' default values, given as a user gives them, so that sdumc leaves them alone.
SIDES = {"OpenMP's": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}, "ours": {}}
NEIGHBOURS = (0, 1, 2)
IDLE_ROUNDS = 4  # more, as this goal leaves the least room, and its samples are quick
SLOW_REPEATS = 2  # with OpenMP's defaults beside neighbours: a call may take a minute, and no goal needs it
ALONE, BESIDE = 0.5, 1.0  # seconds that a sample lasts, at least one call
MOST = {1: 2.5, 2: 4.0}  # neighbours -> how many times slower than alone it may be


@dataclass(frozen=True)
class Work:
    """What is measured: its title, its name in :mod:`sdumc.bench.work`, in how many ranks of how many threads."""

    title: str
    name: str
    ranks: int = 1
    threads: int | None = None  # None: torch's own number


WORKS = (
    Work("training step, 32 sentences, text only", "sentences"),
    Work("the same, two ranks of two threads", "sentences", 2, 2),
    Work("training step, released dimensions", "released"),
    Work("features of sound, WavLM-base's size", "sound"),
    Work("features of text, SmolLM2-135M's size", "text"),
)


class Worker:
    """The processes of one side of a work; :meth:`sample` has them run for a while. A context manager."""

    def __init__(self, work: Work, side: str, port: int):
        env = {k: v for k, v in os.environ.items() if k not in WAITING_NAMES} | SIDES[side]
        if work.threads:
            env["OMP_NUM_THREADS"] = str(work.threads)
        self.processes = []
        for rank in range(work.ranks):
            if work.ranks > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(work.ranks)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, "-m", "sdumc.bench.work", work.name]
            self.processes.append(
                subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )

    def __enter__(self) -> Worker:
        self._answers()
        return self

    def __exit__(self, *_error) -> None:
        for process in self.processes:
            _stream(process.stdin).close()
        for process in self.processes:
            process.wait()

    def sample(self, seconds: float) -> float:
        """Seconds that a call takes on average in the next ``seconds``, or in one call if that takes longer."""
        for process in self.processes:
            stdin = _stream(process.stdin)
            stdin.write(f"{seconds}\n")
            stdin.flush()
        return float(self._answers()[0])

    def _answers(self) -> list[str]:
        lines = [_stream(process.stdout).readline().strip() for process in self.processes]
        if not all(lines):
            raise RuntimeError("a process of the benchmark ended early; what it printed is above")
        return lines


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` processes that keep a core busy each, for as long as this lasts."""
    code = f"from sdumc.machine import die_with\ndie_with({os.getpid()})\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        if count:
            time.sleep(0.5)  # until they count
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(work: Work, repeats: int) -> dict[tuple[str, int], list[float]]:
    """Seconds of a call by side and number of neighbours, ``repeats`` averages each, the sides in turn: without
    neighbours ``IDLE_ROUNDS`` times as many, beside neighbours not more than ``SLOW_REPEATS`` of OpenMP's."""
    times: dict[tuple[str, int], list[float]] = {(side, n): [] for side in SIDES for n in NEIGHBOURS}
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(work, side, free_port())) for side in SIDES}
        for repeat in range(repeats):
            for i in range(IDLE_ROUNDS):
                for side in list(SIDES)[:: 1 if i % 2 == 0 else -1]:  # A B B A: a drift affects both
                    times[side, 0].append(workers[side].sample(ALONE))
            for n in NEIGHBOURS[1:]:
                with busy(n):
                    for side in SIDES:
                        if side == "ours" or repeat < SLOW_REPEATS:
                            times[side, n].append(workers[side].sample(BESIDE))
    return times


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main(repeats: int) -> bool:
    """Print times and ratios of every work; whether all goals are reached."""
    rows, values = [], []
    for work in WORKS:
        times = measure(work, repeats)
        for side in SIDES:
            alone = statistics.median(times[side, 0])
            cells = [f"{1000 * median(times[side, n]):.1f}" for n in NEIGHBOURS]
            cells += [f"{median(times[side, n]) / alone:.1f}" for n in NEIGHBOURS[1:]]
            rows.append([work.title, side, *cells])
        idle = ratio(times["ours", 0], times["OpenMP's", 0])
        values.append((f"{work.title}: time of OpenMP's, alone,", idle, 1.03))
        for n, most in MOST.items():
            slower = median(times["ours", n]) / median(times["ours", 0])
            values.append((f"{work.title}: times as slow beside {n}", slower, most))
    header = ["work", "waiting", "alone (ms)", "beside 1 (ms)", "beside 2 (ms)", "times, 1", "times, 2"]
    print(table(header, rows) + "\n")
    reached = [goal(what, value, most=most) for what, value, most in values]
    return all(reached)
