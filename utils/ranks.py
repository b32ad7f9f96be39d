#!/usr/bin/env python3
"""Run a command as several ranks on this machine: ranks.py N COMMAND [WORD...]

Each rank gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as from torchrun, and
writes to this command's streams. Recipes need three things that torchrun does not do:

* SIGTERM and SIGUSR1 are passed to the ranks, which save their state. If they then exit with 75, so does this command.
  SIGUSR1 is blocked in a rank until the rank unblocks it (pthread_sigmask), so that it cannot kill a rank that starts.
* When a rank fails, the others are killed at once, and its exit code is this command's (128 + N for signal N).
* When this command itself is killed, even by SIGKILL, the ranks die too.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import jobs


def start(command: list[str], rank: int, size: int, port: int) -> subprocess.Popen:
    """Start one rank; it dies with this process."""
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, jobs.cores() // size)))
    me = os.getpid()

    def in_child() -> None:
        jobs.in_child()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        jobs.die_with_parent(signal.SIGKILL)  # not SIGTERM, which a rank that hangs would not act on
        if os.getppid() != me:  # the parent was killed before the line above took effect
            os._exit(1)

    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, preexec_fn=in_child)


def run(command: list[str], size: int) -> int:
    """Run the ranks to their end; returns the exit code for the shell."""
    jobs.watch_signals()
    port = jobs.free_port(random.randrange(1 << 20), "127.0.0.1")
    running: dict[int, subprocess.Popen] = {}
    for rank in range(size):
        try:
            running[rank] = start(command, rank, size, port)
        except OSError as e:
            print(f"ranks.py: error: cannot start {command[0]}: {e.strerror}", file=sys.stderr)
            send(running, signal.SIGKILL)
            return 127
    result, deadline = 0, None
    while running:
        number = jobs.next_signal(None if deadline is None else deadline - time.monotonic())
        if jobs.is_stop(number):
            send(running, signal.SIGTERM)
        elif number == signal.SIGUSR1:
            send(running, signal.SIGUSR1)
        elif number is None:  # GRACE seconds after the first rank saved and exited, others still run
            send(running, signal.SIGKILL)
        for rank, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[rank]
            code = code if code >= 0 else 128 - code
            if code == jobs.EXIT_REQUEUE and result in (0, code):
                result, deadline = code, deadline or time.monotonic() + jobs.GRACE
            elif code and result in (0, jobs.EXIT_REQUEUE):  # the first failure causes the others
                result = code
                print(
                    f"ranks.py: rank {rank} of {size} failed first, exit code {code}{jobs.explain(code)}; "
                    f"{len(running)} other(s) killed",
                    file=sys.stderr,
                )
                send(running, signal.SIGKILL)
    return result


def send(running: dict[int, subprocess.Popen], number: int) -> None:
    for process in running.values():
        process.send_signal(number)


def main() -> int:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__.strip())
        return 0 if argv else 2
    if not argv[0].isdigit() or int(argv[0]) < 1 or len(argv) < 2:
        print("ranks.py: error: usage: ranks.py N COMMAND [WORD...], with N ranks, at least 1", file=sys.stderr)
        return 2
    try:
        return run(argv[1:], int(argv[0]))
    except jobs.UsageError as e:
        print(f"ranks.py: error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
