"""Shared by the job runners run.py and slurm.py: command-line syntax, log format, starting and stopping processes.

It uses only Python's standard library, because the runners also work before (and outside) the recipe's environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

EXIT_REQUEUE = 75  # of a command that saved its state on a signal and should be run again; as in sdumc/errors.py
TAIL_LINES = 15
GRACE = 30.0  # seconds between SIGTERM and SIGKILL: in that time a training saves its state
END = "# ended:   "
REQUEUED = ", requeued"
# Options of both runners, all with a value; a recipe's slurm.conf may add more.
OPTIONS = {
    "mem",
    "gpu",
    "num_threads",
    "max_jobs_run",
    "time",
    "num_nodes",
    "tasks_per_node",
    "partition",
    "account",
    "qos",
    "config",
}


class UsageError(Exception):
    """A wrong command line of a runner."""


@dataclass(frozen=True)
class Spec:
    """One call of a runner: `[options] [JOB=first:last] log command...`."""

    options: dict[str, str]
    variable: str  # "" for a single job without JOB=
    first: int
    last: int
    log: str
    command: list[str]

    @property
    def indices(self) -> range:
        return range(self.first, self.last + 1)

    def fill(self, text: str, index: int) -> str:
        """Put the job's number in place of the variable's name wherever it occurs, as Kaldi's runners do."""
        return text.replace(self.variable, str(index)) if self.variable else text

    def log_of(self, index: int) -> Path:
        return Path(self.fill(self.log, index))

    def command_of(self, index: int) -> list[str]:
        return [self.fill(word, index) for word in self.command]

    def label(self, index: int) -> str:
        return f"job {index} of {self.first}:{self.last}" if self.variable else "the job"

    def number(self, option: str, default: int) -> int:
        """An option's value as a whole number.

        Raises:
            UsageError: it is not one.
        """
        value = self.options.get(option, str(default))
        if not value.isdigit():
            raise UsageError(f"--{option.replace('_', '-')} needs a whole number, not {value!r}")
        return int(value)


def check_options(spec: Spec, known: set[str]) -> None:
    """Check that all options are known.

    Raises:
        UsageError: an option is unknown; the message lists the known ones.
    """
    for name in spec.options:
        if name not in known:
            listed = " ".join(sorted("--" + k.replace("_", "-") for k in known))
            raise UsageError(f"unknown option --{name.replace('_', '-')}; known are: {listed}")


def parse(argv: list[str]) -> Spec:
    """Read a runner's command line. The names of the options are checked later, by `check_options`.

    Raises:
        UsageError: option without value, empty range, no log or command, one log for several jobs.
    """
    words = list(argv)
    options: dict[str, str] = {}
    while words and words[0].startswith("--"):
        name, has_value, value = words.pop(0)[2:].partition("=")
        name = name.replace("-", "_")
        if not has_value:
            if not words or words[0].startswith("--"):
                raise UsageError(f"option --{name.replace('_', '-')} needs a value")
            value = words.pop(0)
        options[name] = value
    variable, first, last = "", 1, 1
    if words and (match := re.fullmatch(r"([A-Za-z_]\w*)=(\d+)(?::(\d+))?", words[0])):
        words.pop(0)
        variable, first = match[1], int(match[2])
        last = int(match[3] or match[2])
        if last < first:
            raise UsageError(f"{match[0]} is an empty range of jobs")
    if len(words) < 2:
        raise UsageError(
            "usage: [options] [JOB=1:8] LOG COMMAND [WORD...], for example --mem 4G JOB=1:8 x.JOB.log cp a b"
        )
    log, command = words[0], words[1:]
    if last > first and variable not in log:
        raise UsageError(f"the log's name {log!r} has no {variable} in it: all jobs would write the same file")
    return Spec(options, variable, first, last, log, command)


def cores() -> int:
    """Number of CPU cores that this process may use, limited by a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        pass
    return count


def free_port(number: int, address: str = "") -> int:
    """A port on which ranks can meet, below those that the system gives to outgoing connections.

    Args:
        number: where the search begins, such as a job's number: two jobs on a machine then try different ports.
        address: of this machine; empty: all its addresses.
    """
    ports = [20000 + (number + 97 * i) % 12000 for i in range(100)]
    for port in ports:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind((address, port))
            return port
    return ports[0]  # the ranks will say what is wrong with it


# ---- one job --------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A started job."""

    index: int
    process: subprocess.Popen
    log: Path
    start: float
    gpus: tuple[str, ...] = ()


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies: a killed recipe leaves nothing running."""
    if _PRCTL is not None:
        _PRCTL(1, number)  # PR_SET_PDEATHSIG


_PRCTL: Any
try:
    _PRCTL = ctypes.CDLL(None).prctl
except (AttributeError, OSError):  # not Linux
    _PRCTL = None


def in_child() -> None:
    """Between fork and exec: die with the parent, and unblock the signals that the parent blocks."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


def start_job(command: list[str], log: Path, env: dict[str, str], index: int = 1, append: bool = False) -> Running:
    """Start `command` in a process group of its own with both output streams in `log`; no shell reads the words."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with open(log, "ab" if append else "wb") as f:
        lines = [
            f"# command: {shlex.join(command)}",
            f"# host:    {socket.gethostname()}",
            f"# start:   {time.strftime('%F %T')}",
        ]
        f.write(("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
    with open(log, "ab") as f:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=f,
                env=env,
                start_new_session=True,
                preexec_fn=in_child,
            )
        except OSError as e:
            f.write(f"cannot start {command[0]}: {e.strerror}\n".encode())
            f.write(f"{END}{time.strftime('%F %T')}, exit code 127, 0.0 s\n".encode())
            raise
    return Running(index, process, log, start)


def finish_job(job: Running, status: int, usage, note: str = "", code: int | None = None) -> int:
    """Write the log's last line; returns the exit code, 128 + signal number for a job ended by a signal.

    If `code` is given, it is used instead of the exit code in `status`.
    """
    code = os.waitstatus_to_exitcode(status) if code is None else code
    job.process.returncode = code  # wait4 has already collected it
    what = f"exit code {code}" if code >= 0 else f"exit code {128 - code} (killed by {signal_name(-code)})"
    # The kernel reports the largest single process of the job, in KiB on Linux.
    memory = usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    seconds = time.time() - job.start
    with open(job.log, "rb+") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 1))
        newline = b"" if f.read(1) == b"\n" else b"\n"
        f.seek(0, os.SEEK_END)
        line = f"{END}{time.strftime('%F %T')}, {what}, {seconds:.1f} s, peak memory {memory:.0f} MB{note}\n"
        f.write(newline + line.encode())
    return code if code >= 0 else 128 - code


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def ended(log: Path) -> int | None:
    """The exit code in a log's last line; None when the job has not written one, or was requeued."""
    try:
        with open(log, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 1000))
            last = f.read().decode("utf-8", "replace").rstrip("\n").rpartition("\n")[2]
    except OSError:
        return None
    match = re.search(r"exit code (\d+)", last) if last.startswith(END) and not last.endswith(REQUEUED) else None
    return int(match[1]) if match else None


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented, for an error message."""
    try:
        with open(log, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 20000))
            text = f.read().decode("utf-8", "replace")
    except OSError as e:
        return f"    (cannot be read: {e.strerror})"
    # A progress bar rewrites its line with carriage returns; show only its last state.
    kept = [line.rpartition("\r")[2] for line in text.rstrip("\n").split("\n")]
    return "\n".join("    " + line[:500] for line in kept[-lines:]) if text else "    (empty)"


def explain(code: int) -> str:
    """What an exit code means, if it is a special one."""
    if code == EXIT_REQUEUE:
        return " (stopped by a signal, its state is saved: run the same command again to go on)"
    if code == 137:
        return " (killed; often because memory ran out)"
    return f" ({signal_name(code - 128)})" if 128 < code < 160 else ""


# ---- waiting and stopping -------------------------------------------------------------------------------------------

_STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_WATCHED = _STOPPING | {signal.SIGCHLD, signal.SIGUSR1}


def watch_signals() -> None:
    """Block the signals that `next_signal` returns one by one, so that none interrupts other code."""
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    die_with_parent()


def next_signal(timeout: float | None = None) -> int | None:
    """Wait until a child ends (SIGCHLD), or for a stop signal or SIGUSR1; None after `timeout` seconds."""
    if timeout is None:
        return signal.sigwait(_WATCHED)
    info = signal.sigtimedwait(_WATCHED, max(0.0, timeout))
    return info.si_signo if info else None


def is_stop(number: int | None) -> TypeGuard[int]:
    return number in _STOPPING


def reap(running: dict[int, Running]) -> list[tuple[Running, int, Any]]:
    """Collect the jobs that have ended: (job, wait status, resource usage)."""
    found = []
    while running:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        if pid in running:
            found.append((running.pop(pid), status, usage))
    return found


def stop_jobs(running: dict[int, Running], first: int = signal.SIGTERM) -> None:
    """Stop jobs and their children: signal, wait up to GRACE seconds, kill. A second stop signal kills at once."""
    groups = list(running)
    _signal_groups(groups, first)
    deadline = time.monotonic() + GRACE
    said = False
    while running:
        number = next_signal(min(1.0, deadline - time.monotonic()))
        if is_stop(number) or time.monotonic() >= deadline:
            _signal_groups(list(running), signal.SIGKILL)
        elif number is None and not said:
            print(f"waiting for {len(running)} job(s) to end; once more to kill them", file=sys.stderr)
            said = True
        for job, status, usage in reap(running):
            finish_job(job, status, usage, note=" (stopped)")
    _signal_groups(groups, signal.SIGKILL)  # processes that a job has started and left running


def _signal_groups(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
