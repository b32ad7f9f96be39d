#!/usr/bin/env python3
"""Run jobs on Slurm: slurm.py [--mem 4G] [--gpu 1] [--num-threads 2] [--time 4:00:00] [JOB=1:8] LOG COMMAND...

The same command line, log format and exit codes as run.py; conf/slurm.conf says how the options become sbatch options.
One job array is submitted and waited for. A task that fails, is cancelled or is killed by Slurm ends the others, its
reason and its log's last lines are shown, and the exit code is not zero. Ctrl-C cancels the array.

  --gpu N             GPUs of each task (of each node with --num-nodes)
  --num-threads N     CPUs of each task; also its OMP_NUM_THREADS
  --max-jobs-run N    tasks at once
  --num-nodes N       nodes of each task; COMMAND then begins with srun
  --tasks-per-node N  srun's ranks on each node
  --config FILE       another file than conf/slurm.conf

A command that exits with 75 has saved its state on a signal (preemption, time limit): its task goes back to the queue.
The environment and the working directory are passed on; both need a file system that the nodes share.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import jobs
import slurm_conf

POLL = 1.0  # seconds between two looks at the logs
QUEUE_POLL = 8.0  # seconds between two questions to the scheduler
LOST_AFTER = 10.0  # a task that has left the queue without an end in its log for so long will not write one any more


# ---- on the node ----------------------------------------------------------------------------------------------------


def run_task(spec_file: str) -> int:
    """Run one task of the array described by `spec_file`; this is what the batch script calls."""
    fields = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    spec = jobs.Spec(**fields)
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", spec.first))
    env = dict(os.environ)
    threads = spec.number("num_threads", 0) or int(env.get("SLURM_CPUS_PER_TASK", 0))
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault("OMP_NUM_THREADS", "1")
    if "SLURM_CPUS_PER_TASK" in env:  # srun within a job does not take it over by itself
        env.setdefault("SRUN_CPUS_PER_TASK", env["SLURM_CPUS_PER_TASK"])
    # Where srun's ranks meet: on this node, which is the first of the task's, and thus rank 0's.
    env.setdefault("MASTER_ADDR", socket.gethostname())
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
    again = int(env.get("SLURM_RESTART_COUNT", 0)) > 0  # a requeued task adds to its log
    jobs.watch_signals()
    try:
        job = jobs.start_job(spec.command_of(index), spec.log_of(index), env, index, append=again)
    except OSError:
        return 127
    running = {job.process.pid: job}
    while True:
        number = jobs.next_signal()
        if number is not None and number != signal.SIGCHLD and running:
            job.process.send_signal(number)  # preemption or time limit: the command saves its state and exits with 75
        for job, status, usage in jobs.reap(running):
            wants_more = os.WIFEXITED(status) and os.WEXITSTATUS(status) == jobs.EXIT_REQUEUE
            requeued = wants_more and requeue()
            return jobs.finish_job(job, status, usage, note=jobs.REQUEUED if requeued else "")


def requeue() -> bool:
    """Put this task back into the queue."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return subprocess.run(["scontrol", "requeue", name], check=False, stdin=subprocess.DEVNULL).returncode == 0


# ---- on the machine that submits ------------------------------------------------------------------------------------


class Array:
    """A submitted job array and what is known of its tasks."""

    def __init__(self, spec: jobs.Spec, conf: slurm_conf.SlurmConf):
        self.spec = spec
        # Kaldi's place for what the scheduler writes: a folder q beside the logs.
        folder = spec.log_of(spec.first).parent / "q"
        folder.mkdir(parents=True, exist_ok=True)
        base = re.sub(r"\W+", "_", spec.fill(Path(spec.log).name.removesuffix(".log"), 0)).strip("_")
        self.folder, self.base = folder, base
        spec_file = (folder / f"{base}.json").resolve()
        spec_file.write_text(json.dumps(asdict(spec)), encoding="utf-8")
        limit = spec.number("max_jobs_run", 0)
        tasks = f"{spec.first}-{spec.last}" + (f"%{limit}" if limit else "")
        self.command = [
            *conf.command,
            "--wait",
            "--parsable",
            f"--job-name={base}",
            f"--array={tasks}",
            f"--output={folder / base}.%a.out",
            "--open-mode=append",
            f"--chdir={os.getcwd()}",
            *conf.words(spec.options),
            str(folder / f"{base}.sh"),
        ]
        words = [sys.executable, str(Path(__file__).resolve()), "--task", str(spec_file)]
        Path(self.command[-1]).write_text(f"#!/bin/bash\nexec {shlex.join(words)}\n", encoding="utf-8")
        self.id = ""
        self.left_queue: dict[int, float] = {}  # task -> when it was first seen missing from the queue

    def forget_old_logs(self) -> None:
        """Remove the logs of an earlier run: their end lines must not count for this one."""
        for index in self.spec.indices:
            self.spec.log_of(index).unlink(missing_ok=True)
            (self.folder / f"{self.base}.{index}.out").unlink(missing_ok=True)

    def submit(self) -> subprocess.Popen:
        """Start `sbatch --wait`; returns when it has told the array's number.

        Raises:
            UsageError: sbatch refused.
        """
        # Through a pipe sbatch would tell its number only at the end; through a terminal it does at once.
        master, slave = pty.openpty()
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=jobs.in_child,
        )
        os.close(slave)
        text = b""
        while b"\n" not in text:
            try:
                chunk = os.read(master, 1000)
            except OSError:  # EIO: sbatch has closed its end
                break
            if not chunk:
                break
            text += chunk
        match = re.search(rb"^(\d+)(;|\s|$)", text.strip())
        if match is None:
            _, errors = process.communicate()
            told = errors.decode("utf-8", "replace").strip() or text.decode("utf-8", "replace").strip()
            raise jobs.UsageError(f"sbatch refused: {told or 'no reason given'}\n  {' '.join(self.command)}")
        self.id = match[1].decode()
        return process

    def in_queue(self) -> set[int] | None:
        """Tasks that wait or run; None when the scheduler does not answer."""
        query = ["squeue", "--noheader", "--array", f"--jobs={self.id}", "--format=%K"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:  # "Invalid job id": all tasks have ended long ago
            return set() if "nvalid job id" in done.stderr else None
        return {int(k) for k in done.stdout.split() if k.isdigit()}

    def reason(self, index: int) -> str:
        """What the scheduler says of a task: its state, reason and exit code."""
        said = ""
        for name in (f"{self.id}_{index}", self.id):  # a task that never started has no entry of its own
            query = ["scontrol", "show", "job", "--oneliner", name]
            try:
                said = said or subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout
            except (OSError, subprocess.TimeoutExpired):
                return ""
        found = [
            f"{key}={m[1]}" for key in ("JobState", "Reason", "ExitCode") if (m := re.search(rf"\b{key}=(\S+)", said))
        ]
        return ", Slurm says " + " ".join(found) if found else ""

    def cancel(self) -> None:
        subprocess.run(["scancel", self.id], check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def problems(self) -> dict[int, str]:
        """Tasks whose log tells of a failure."""
        found = {}
        for index in self.spec.indices:
            code = jobs.ended(self.spec.log_of(index))
            if code not in (None, 0):
                found[index] = f"exit code {code}{jobs.explain(code)}"
        return found

    def unfinished(self) -> list[int]:
        """Tasks without an end in their log."""
        return [i for i in self.spec.indices if jobs.ended(self.spec.log_of(i)) is None]

    def lost(self, queue: set[int], now: float) -> dict[int, str]:
        """Tasks that left the queue some time ago and still have no end in their log: cancelled or killed by Slurm."""
        missing = [i for i in self.unfinished() if i not in queue]
        self.left_queue = {i: self.left_queue.get(i, now) for i in missing}
        return {
            i: "ended without a word of its own (cancelled, killed, out of memory or time)"
            for i, since in self.left_queue.items()
            if now - since >= LOST_AFTER
        }


def run(spec: jobs.Spec, conf: slurm_conf.SlurmConf) -> int:
    """Submit, wait, report; returns the exit code for the shell."""
    array = Array(spec, conf)
    array.forget_old_logs()
    process = array.submit()
    jobs.watch_signals()
    next_query = time.monotonic() + QUEUE_POLL
    ended_at = None  # when sbatch --wait came back
    while True:
        number = jobs.next_signal(POLL)
        if jobs.is_stop(number):
            print(f"slurm.py: {jobs.signal_name(number)}: cancelling Slurm job {array.id}", file=sys.stderr)
            array.cancel()
            return 128 + number
        bad = array.problems()
        now = time.monotonic()
        if ended_at is None and process.poll() is not None:
            ended_at, next_query = now, now
        if not bad and now >= next_query:
            next_query = now + QUEUE_POLL
            queue = array.in_queue()
            if queue is None and ended_at is not None and now - ended_at > LOST_AFTER:
                queue = set()  # sbatch has come back, and the scheduler is silent
            if queue is not None:
                bad = array.lost(queue, now)
        if bad:
            array.cancel()
            return report(array, bad)
        if not array.unfinished():
            # The logs decide, not sbatch: it returns 0 for a job cancelled while pending.
            if ended_at is None:
                process.terminate()
            return 0
        if ended_at is not None:  # soon over: ask more often, the file system may only be late
            next_query = min(next_query, now + 2 * POLL)


def report(array: Array, bad: dict[int, str]) -> int:
    """Tell the user which tasks failed, why, and what their logs end with; returns the first one's exit code."""
    print("", file=sys.stderr)
    for index, what in list(bad.items())[:8]:
        print(f"slurm.py: {array.spec.label(index)} failed: {what}{array.reason(index)}", file=sys.stderr)
    if len(bad) > 8:
        print(f"slurm.py: and {len(bad) - 8} more", file=sys.stderr)
    print(f"slurm.py: Slurm job {array.id}; the other tasks are cancelled", file=sys.stderr)
    index = next(iter(bad))
    log = array.spec.log_of(index)
    print(f"slurm.py: log: {log}\nslurm.py: its last lines:\n{jobs.tail(log)}", file=sys.stderr)
    scheduler_log = array.folder / f"{array.base}.{index}.out"
    if scheduler_log.exists() and scheduler_log.stat().st_size:
        print(f"slurm.py: Slurm's own words ({scheduler_log}):\n{jobs.tail(scheduler_log)}", file=sys.stderr)
    return jobs.ended(log) or 1


def main() -> int:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__.strip())
        return 0 if argv else 2
    if argv[0] == "--task":
        return run_task(argv[1])
    try:
        spec = jobs.parse(argv)
        conf = slurm_conf.load(spec.options.get("config"))
        jobs.check_options(spec, jobs.OPTIONS | set(conf.rules))
        return run(spec, conf)
    except jobs.UsageError as e:
        print(f"slurm.py: error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"slurm.py: error: {e.filename or ''}: {e.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
