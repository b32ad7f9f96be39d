"""How things are measured here: interleaved repeats, medians, and peak memory in a process of its own."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from sdumc.reporting.report import markdown_table


def machine() -> str:
    """One line on what was measured on."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{where}, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"


def synchronise() -> None:
    """Wait for the GPU, if there is one, so that a clock read means something."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, A B A B ..., so that a busy spell of the machine meets both."""
    for _ in range(warm_up):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def spread(times: list[float]) -> str:
    """Lowest and highest, as text."""
    return f"{min(times):.3g}-{max(times):.3g}"


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times ``fast`` is as fast: the median of the pairs' ratios, each pair measured back to back."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_memory(call: Callable[[], object]) -> float:
    """Peak memory in MiB that ``call`` adds: as the GPU's allocator saw it, else of a fresh process's resident set."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronise()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # The peak memory of a process never falls, so each measurement gets a new process.
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure_in_child, args=(call, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    finally:
        process.join()


def _measure_in_child(call: Callable[[], object], send) -> None:
    # getrusage's maximum is inherited from the parent; the kernel's own high-water mark can be reset.
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = _high_water_mark()
    call()
    send.send((_high_water_mark() - before) / 1024)


def _high_water_mark() -> int:
    """Largest resident set of this process so far, in KiB (Linux)."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))


def goal(what: str, value: float, least: float | None = None, most: float | None = None) -> bool:
    """Print whether a measured ``value`` reaches what is aimed at, and return it."""
    met = (least is None or value >= least) and (most is None or value <= most)
    aim = f"at least {least:g}" if most is None else f"at most {most:g}"
    print(f"Goal: {what} {aim}; measured {value:.3g}: {'reached' if met else 'MISSED'}")
    return met


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with straight columns, as it is printed on a terminal too."""
    return markdown_table(header, rows, left=len(header), padded=True)
