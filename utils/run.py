#!/usr/bin/env python3
"""Run jobs on this machine: run.py [--mem 4G] [--gpu 1] [--num-threads 2] [--max-jobs-run 4] [JOB=1:8] LOG COMMAND...

The name before `=1:8` (usually JOB) is replaced by the job's number in LOG and in every word of COMMAND. The words
reach the command unchanged: no shell reads them. Each job's output goes to its log, between a header (command, host,
start) and a last line (end, exit code, seconds, peak memory of its largest process). When a job fails, the others are
stopped, the name and the last lines of the failed job's log are shown, and the exit code is that job's. Ctrl-C stops
all jobs.

  --gpu N             give each job N of this machine's GPUs by CUDA_VISIBLE_DEVICES; no effect on a machine without GPU
  --num-threads N     OMP_NUM_THREADS of each job; default: the cores divided by the jobs that run at once
  --tasks-per-node N  processes that COMMAND itself starts (the ranks of ranks.py): they share the cores
  --max-jobs-run N    jobs at once; default: as many as the GPUs allow, or cores / threads
  --mem --time --num-nodes --partition ... are for slurm.py; here they are accepted and ignored
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import jobs
import slurm_conf


def visible_gpus() -> list[str]:
    """Names of the GPUs that jobs may use, as CUDA_VISIBLE_DEVICES has them."""
    set_by_user = os.environ.get("CUDA_VISIBLE_DEVICES")
    if set_by_user is not None:
        return [d.strip() for d in set_by_user.split(",") if d.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listing.splitlines()))]


def run(spec: jobs.Spec) -> int:
    """Run all jobs of `spec`; returns the exit code for the shell."""
    gpus_per_job = spec.number("gpu", 0)
    threads = spec.number("num_threads", 0)
    if spec.number("num_nodes", 1) > 1:
        raise jobs.UsageError(
            "--num-nodes: this runner uses one machine; several nodes need cmd_backend=slurm in cmd.sh"
        )
    gpus = visible_gpus() if gpus_per_job else []
    if gpus and gpus_per_job > len(gpus):
        raise jobs.UsageError(f"--gpu {gpus_per_job}: this machine has {len(gpus)} GPU(s) to use")
    limit = len(gpus) // gpus_per_job if gpus else jobs.cores() // max(1, threads)
    limit = max(1, min(spec.number("max_jobs_run", limit), len(spec.indices)))

    env = dict(os.environ)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    else:
        processes = limit * max(1, spec.number("tasks_per_node", 1))
        env.setdefault("OMP_NUM_THREADS", str(max(1, jobs.cores() // processes)))

    jobs.watch_signals()
    todo = list(spec.indices)
    running: dict[int, jobs.Running] = {}
    while todo or running:
        while todo and len(running) < limit:
            index = todo.pop(0)
            taken = [g for job in running.values() for g in job.gpus]
            mine = tuple(sorted(gpus, key=taken.count)[:gpus_per_job])
            job_env = {**env, "CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else env
            try:
                job = jobs.start_job(spec.command_of(index), spec.log_of(index), job_env, index)
            except OSError:
                return report(spec, index, 127, running)
            job.gpus = mine
            running[job.process.pid] = job
        number = jobs.next_signal()
        if jobs.is_stop(number):
            print(f"run.py: {jobs.signal_name(number)}: stopping {len(running)} job(s)", file=sys.stderr)
            jobs.stop_jobs(running)
            return 128 + number
        for job, status, usage in jobs.reap(running):
            code = jobs.finish_job(job, status, usage)
            if code != 0:
                return report(spec, job.index, code, running)
    return 0


def report(spec: jobs.Spec, index: int, code: int, running: dict[int, jobs.Running]) -> int:
    """Stop the other jobs and show the user the failed job's log; returns that job's exit code."""
    others = f"; {len(running)} other job(s) stopped" if running else ""
    jobs.stop_jobs(running)
    log = spec.log_of(index)
    print(f"\nrun.py: {spec.label(index)} failed, exit code {code}{jobs.explain(code)}{others}", file=sys.stderr)
    print(f"run.py: log: {log}\nrun.py: its last lines:\n{jobs.tail(log)}", file=sys.stderr)
    return code


def main() -> int:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        spec = jobs.parse(argv)
        jobs.check_options(spec, jobs.OPTIONS | slurm_conf.extra_options())
        return run(spec)
    except jobs.UsageError as e:
        print(f"run.py: error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"run.py: error: {e.filename or ''}: {e.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
