#!/usr/bin/env python3
"""Run jobs on Slurm: slurm.py [--mem 4G] [--gpu 1] [--num-threads 2] [--time 4:00:00] [JOB=1:8] LOG COMMAND...

The command line, log format and exit codes are those of run.py; conf/slurm.conf translates the options to sbatch
options. The runner submits one job array and waits for it. When a task fails, is cancelled or is killed by Slurm, the
other tasks are cancelled, the reason and the last lines of its log are shown, and the exit code is not zero. Ctrl-C
cancels the array and waits until it has ended; a second Ctrl-C kills it.

  --gpu N             GPUs of each task (of each node with --num-nodes)
  --num-threads N     CPUs of each task; also its OMP_NUM_THREADS
  --max-jobs-run N    tasks at once
  --num-nodes N       nodes of each task; COMMAND must then begin with srun
  --tasks-per-node N  srun's ranks on each node
  --config FILE       a file to use instead of conf/slurm.conf

Exit code 75 of a command means that it has saved its state on a signal (preemption, time limit): its task is requeued,
unless it was cancelled. The environment and the working directory are passed on; both must be on a file system that the
nodes share.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
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

# All in seconds.
POLL = 1.0  # between two reads of the logs
QUEUE_POLL = 6.0  # between two queries of the scheduler
LOST_AFTER = 6.0  # when Slurm says that a task has ended, how long to wait for the last line of its log
LATE_AFTER = 60.0  # the same when Slurm says "completed": a shared file system can show the line late
CANCEL_PATIENCE = 120.0  # how long cancelled tasks may take to save their state and end; Slurm's KillWait is 30
SUBMIT_PATIENCE = 10.0  # after Ctrl-C, how long to wait for the job number, which is needed to cancel the job
# States of a task that will not run any more; in all other states it waits, runs or is ending.
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "REVOKED",
}
# Reasons for waiting that need no action of the user; all others are shown.
ORDINARY = {"None", "Resources", "Priority", "BeginTime", "Cleaning", "JobArrayTaskLimit", "Prolog", "Licenses"}
# Exit codes of srun when it has killed ranks (--kill-on-bad-exit), and of a command that does not handle SIGUSR1.
KILLED = {128 + signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGUSR1}


# ---- on the node ----------------------------------------------------------------------------------------------------


def run_task(spec_file: str) -> int:
    """Run one task of the array described by `spec_file`; this is what the batch script calls."""
    try:
        fields = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    except OSError as e:
        print(f"slurm.py: error: {spec_file}: {e.strerror} on {socket.gethostname()}: all nodes must see this folder")
        return 1
    spec = jobs.Spec(**fields)
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", spec.first))
    env = dict(os.environ)
    threads = spec.number("num_threads", 0) or int(env.get("SLURM_CPUS_PER_TASK", 0))
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault("OMP_NUM_THREADS", "1")
    if "SLURM_CPUS_PER_TASK" in env:  # srun inside a job does not read this variable, but SRUN_CPUS_PER_TASK
        env.setdefault("SRUN_CPUS_PER_TASK", env["SLURM_CPUS_PER_TASK"])
    # srun's ranks meet on this node: the first node of the task, where rank 0 runs.
    env.setdefault("MASTER_ADDR", socket.gethostname())
    env.setdefault("MASTER_PORT", str(jobs.free_port(int(env.get("SLURM_JOB_ID", 0)))))
    log = spec.log_of(index)
    again = int(env.get("SLURM_RESTART_COUNT", 0)) > 0  # a requeued task appends to its log
    before = log.stat().st_size if again and log.exists() else 0
    jobs.watch_signals()
    try:
        job = jobs.start_job(spec.command_of(index), log, env, index, append=again)
    except OSError as e:
        print(f"slurm.py: error: {e.filename or log}: {e.strerror} on {socket.gethostname()}")
        return 127
    running = {job.process.pid: job}
    warned = False
    while True:
        number = jobs.next_signal()
        if number is not None and number != signal.SIGCHLD and running:
            # Preemption or time limit: the command saves its state and exits with 75. Not Popen.send_signal: if the
            # command has just ended, that would collect its exit status, which reap needs.
            os.kill(job.process.pid, number)
            warned = warned or number == signal.SIGUSR1
        for job, status, usage in jobs.reap(running):
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else 128 - code
            # When the first rank has exited, srun kills the others, and its own exit code is that of the kill.
            of_ranks = code_of_ranks(log, before) if code in KILLED else None
            code = of_ranks or code
            saved = code == jobs.EXIT_REQUEUE or (code in KILLED and warned)
            queued = code != 0 and back_in_queue(saved)
            return jobs.finish_job(job, status, usage, note=jobs.REQUEUED if queued else "", code=of_ranks)


def code_of_ranks(log: Path, before: int) -> int | None:
    """The exit code of the ranks that exited by themselves, from srun's messages after `before` bytes of the log.

    Returns 75 only if all of these ranks exited with 75, else the first other code. None if there is no message.
    """
    with open(log, "rb") as f:
        f.seek(before)
        found = re.findall(rb"^srun: error: .*: Exited with exit code (\d+)\s*$", f.read(), re.M)
    codes = [int(code) for code in found]
    return next((code for code in codes if code != jobs.EXIT_REQUEUE), codes[0] if codes else None)


def back_in_queue(wanted: bool) -> bool:
    """Whether this task will run again: Slurm has requeued it, or this function does so, if `wanted`."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    query = ["scontrol", "show", "job", "--oneliner", name]
    answer = subprocess.run(query, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    fields = dict(word.partition("=")[::2] for word in answer.split())
    # When a task is preempted or its owner requeues it, Slurm counts the restart before this run has ended.
    restarts = fields.get("Restarts", "")
    if restarts.isdigit() and int(restarts) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        return True
    # The task is ending although this script still runs: it has reached its time limit, or it was cancelled.
    ending = fields.get("JobState") in ("COMPLETING", "CANCELLED")
    if not wanted or (ending and seconds(fields.get("RunTime", "")) < seconds(fields.get("TimeLimit", ""))):
        return False
    return subprocess.run(["scontrol", "requeue", name], check=False, stdin=subprocess.DEVNULL).returncode == 0


def seconds(text: str) -> float:
    """Slurm's [days-]hours:minutes:seconds in seconds; infinite if it is no such time (UNLIMITED)."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return float("inf")
    days, *rest = (int(part or 0) for part in match.groups())
    return days * 86400 + rest[0] * 3600 + rest[1] * 60 + rest[2]


# ---- on the machine that submits ------------------------------------------------------------------------------------


class Array:
    """A job array: its files, submission, and the states of its tasks."""

    def __init__(self, spec: jobs.Spec, conf: slurm_conf.SlurmConf):
        self.spec = spec
        # As in Kaldi, the scheduler's files are in a folder q beside the logs.
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
            f"--output={str(folder / base).replace('%', '%%')}.%a.out",
            "--open-mode=append",
            f"--chdir={os.getcwd()}",
            *conf.words(spec.options),
            str(folder / f"{base}.sh"),
        ]
        words = [sys.executable, str(Path(__file__).resolve()), "--task", str(spec_file)]
        Path(self.command[-1]).write_text(f"#!/bin/bash\nexec {shlex.join(words)}\n", encoding="utf-8")
        self.id = ""
        self.id_file = folder / f"{base}.id"  # exists while the array is in the queue
        self.stopped = 0  # a stop signal that came while sbatch ran
        self.ended_since: dict[int, float] = {}  # task -> when Slurm first reported that it has ended
        self.told: set[str] = set()  # messages that the user has seen
        self.silent_since = 0.0  # since when the scheduler has not answered; 0: it answers

    def end_earlier(self) -> None:
        """Cancel the array of an earlier run that was killed: two arrays would write the same files."""
        try:
            self.id = self.id_file.read_text().strip()
        except OSError:
            return
        if self.id and active(self.states()):
            print(f"slurm.py: cancelling Slurm job {self.id} of an earlier run that was killed", file=sys.stderr)
            self.cancel()
        self.id = ""

    def empty_logs(self) -> None:
        """Empty the logs of an earlier run, so that their last lines are not taken for those of this run.

        They are not removed: on a network file system, a file that was looked up while it did not exist can stay
        invisible for a minute.
        """
        for index in self.spec.indices:
            log = self.spec.log_of(index)
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
            (self.folder / f"{self.base}.{index}.out").unlink(missing_ok=True)

    def submit(self) -> subprocess.Popen:
        """Start `sbatch --wait`; returns when it has printed the array's number.

        Raises:
            UsageError: sbatch refused, or was stopped before it printed the number.
        """
        # Inside another job, such as an interactive session, sbatch and srun would use that job's variables.
        inside = "SLURM_JOB_ID" in os.environ
        env = {k: v for k, v in os.environ.items() if not (inside and k.startswith("SLURM_")) or k == "SLURM_CONF"}
        # sbatch buffers its output if that is a pipe, and would print the number only at the end; hence a terminal.
        master, slave = pty.openpty()
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
            preexec_fn=jobs.in_child,
        )
        os.close(slave)
        text, match, give_up = b"", None, float("inf")
        while match is None:
            number = jobs.next_signal(0)
            if jobs.is_stop(number) and not self.stopped:
                self.stopped, give_up = number, time.monotonic() + SUBMIT_PATIENCE
            if time.monotonic() > give_up:
                process.terminate()
                raise jobs.UsageError(
                    "stopped before sbatch printed a job number; see squeue for a job it has submitted"
                )
            if not select.select([master], [], [], 0.2)[0]:
                continue
            try:
                chunk = os.read(master, 1000)
            except OSError:  # EIO: sbatch has closed its end
                chunk = b""
            if not chunk:
                break
            text += chunk
            match = re.search(rb"^(\d+)(?:;\S*)?\r?\n", text, re.M)
        if match is None:
            _, errors = process.communicate()
            told = errors.decode("utf-8", "replace").strip() or text.decode("utf-8", "replace").strip()
            raise jobs.UsageError(f"sbatch refused: {told or 'no reason given'}\n  {shlex.join(self.command)}")
        self.id = match[1].decode()
        self.id_file.write_text(f"{self.id}\n")
        return process

    def states(self) -> dict[int, tuple[str, str]] | None:
        """Task -> (state, reason) for the tasks that Slurm knows; None when the scheduler does not answer."""
        query = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={self.id}", "--format=%K|%T|%r|%j"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:  # "Invalid job id": all tasks have ended long ago
            return {} if "nvalid job id" in done.stderr else None
        found = {}
        for line in done.stdout.splitlines():
            task, state, reason, name = [*line.split("|"), "", "", ""][:4]
            if task.isdigit() and name == self.base:
                found[int(task)] = (state, reason)
        return found

    def scancel(self, *words: str) -> None:
        command = ["scancel", "--quiet", *words, self.id]
        subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def cancel(self) -> None:
        """Cancel all tasks and wait until they have ended, because the next run may read the files that they write.

        Meanwhile a training saves its state. A stop signal in that time kills the tasks.
        """
        self.scancel()
        start, said = time.monotonic(), False
        while time.monotonic() < start + CANCEL_PATIENCE:
            states = self.states()
            left = active(states)
            if states is not None and not left:
                self.id_file.unlink(missing_ok=True)
                return
            # A task that was being requeued when it was cancelled.
            self.scancel("--state=PENDING")
            if not said and time.monotonic() > start + 3:
                what = f"{len(left)} task(s) to end; once more to kill them" if left else "the scheduler's answer"
                print(f"slurm.py: waiting for {what}", file=sys.stderr)
                said = True
            if jobs.is_stop(jobs.next_signal(POLL)):
                if states is None:
                    break
                self.scancel("--signal=KILL", "--full")
        print(f"slurm.py: Slurm job {self.id} has still not ended; see squeue", file=sys.stderr)

    def reason(self, index: int) -> str:
        """The scheduler's information about a task: its state, reason and exit code."""
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

    def problems(self) -> dict[int, str]:
        """Tasks whose log ends with a failure."""
        found = {}
        for index in self.spec.indices:
            code = jobs.ended(self.spec.log_of(index))
            if code not in (None, 0):
                found[index] = f"exit code {code}{jobs.explain(code)}"
        return found

    def unfinished(self) -> list[int]:
        """Tasks whose log has no last line yet."""
        return [i for i in self.spec.indices if jobs.ended(self.spec.log_of(i)) is None]

    def lost(self, now: float) -> dict[int, str]:
        """Query the scheduler for tasks that have ended without a last line in their log: cancelled or killed ones.

        Also tells the user, once each, when a task waits for a reason that needs action, and when the scheduler does
        not answer.
        """
        states = self.states()
        if states is None:
            self.silent_since = self.silent_since or now
            if now - self.silent_since > LATE_AFTER:
                self.tell("the scheduler does not answer; waiting for it")
            return {}
        self.silent_since = 0.0
        found, since = {}, {}
        for index in self.unfinished():
            state, reason = states.get(index, ("", ""))
            if state and state not in ENDED:
                if state == "PENDING" and reason.partition(",")[0] not in ORDINARY:
                    self.tell(f"Slurm job {self.id} waits: {reason}")
                continue
            since[index] = self.ended_since.get(index, now)
            if now - since[index] >= (LATE_AFTER if state == "COMPLETED" else LOST_AFTER):
                found[index] = "ended without a last line in its log (cancelled, killed, out of memory or time)"
        self.ended_since = since
        return found

    def tell(self, what: str) -> None:
        if what not in self.told:
            print(f"slurm.py: {what}", file=sys.stderr)
        self.told.add(what)


def active(states: dict[int, tuple[str, str]] | None) -> list[int]:
    """Tasks that wait, run or are ending, according to the scheduler."""
    return [i for i, (state, _) in (states or {}).items() if state not in ENDED]


def run(spec: jobs.Spec, conf: slurm_conf.SlurmConf) -> int:
    """Submit, wait, report; returns the exit code for the shell."""
    array = Array(spec, conf)
    jobs.watch_signals()
    array.end_earlier()
    array.empty_logs()
    process = array.submit()
    next_query = time.monotonic() + QUEUE_POLL
    returned = False  # whether sbatch --wait has ended
    while True:
        number = array.stopped or jobs.next_signal(POLL)
        if jobs.is_stop(number):
            print(f"slurm.py: {jobs.signal_name(number)}: cancelling Slurm job {array.id}", file=sys.stderr)
            array.cancel()
            return 128 + number
        bad = array.problems()
        now = time.monotonic()
        if not returned and process.poll() is not None:
            returned, next_query = True, now
        if not bad and now >= next_query:
            bad = array.lost(now)
            # The array will end soon, or something is wrong: query more often.
            next_query = now + (2 * POLL if returned or array.ended_since else QUEUE_POLL)
        if bad:
            return report(array, bad)
        if not array.unfinished():
            # The logs decide, not sbatch: its exit code is 0 for a job that was cancelled while it waited.
            if not returned:
                process.terminate()
            array.scancel("--state=PENDING")  # a task that was requeued just before it ended successfully
            array.id_file.unlink(missing_ok=True)
            return 0


def report(array: Array, bad: dict[int, str]) -> int:
    """Cancel the other tasks; show which tasks failed and why; returns the exit code of the first one."""
    codes = {i: jobs.ended(array.spec.log_of(i)) for i in bad}
    print(f"\nslurm.py: {array.spec.label(next(iter(bad)))} failed; ending Slurm job {array.id}", file=sys.stderr)
    # A task writes the last line of its log just before it ends. If it is cancelled in between, Slurm reports
    # "cancelled" and not its exit code; so wait until it has ended.
    deadline = time.monotonic() + LOST_AFTER
    while set(bad) & set(active(array.states())) and time.monotonic() < deadline:
        if jobs.is_stop(jobs.next_signal(POLL / 2)):
            break
    array.cancel()
    for index, what in list(bad.items())[:8]:
        print(f"slurm.py: {array.spec.label(index)} failed: {what}{array.reason(index)}", file=sys.stderr)
    if len(bad) > 8:
        print(f"slurm.py: and {len(bad) - 8} more", file=sys.stderr)
    index = next(iter(bad))
    log = array.spec.log_of(index)
    print(f"slurm.py: log: {log}\nslurm.py: its last lines:\n{jobs.tail(log)}", file=sys.stderr)
    scheduler_log = array.folder / f"{array.base}.{index}.out"
    if scheduler_log.exists() and scheduler_log.stat().st_size:
        print(f"slurm.py: Slurm's output ({scheduler_log}):\n{jobs.tail(scheduler_log)}", file=sys.stderr)
    return codes[index] or 1


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
