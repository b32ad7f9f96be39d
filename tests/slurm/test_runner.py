"""utils/slurm.py on a real Slurm: what arrives, what is noticed, what is shown, and that nothing is left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers.cluster import Cluster
from helpers.stopping import has_pending, wait_until

ROOT = Path(__file__).resolve().parents[2]
RUNNER = [sys.executable, str(ROOT / "utils" / "slurm.py")]
LONG = 3000  # seconds that a task lasts which is expected to be stopped: more than all guards together
GUARD = 600  # seconds for what takes some on an idle machine
TRAINING_CONF = """\
command sbatch --export=ALL
option mem=* --mem=$0
option requeue=true --requeue
option num_nodes=* --nodes=$0
option tasks_per_node=* --ntasks-per-node=$0
option hold=true --hold
"""
# Saves its state on the first signal and asks for another turn; the second turn ends well.
SAVER = """\
trap 'echo saved; exit 75' TERM USR1
echo "turn ${SLURM_RESTART_COUNT:-0}"
if [[ -n ${SLURM_RESTART_COUNT-} ]]; then exit 0; fi
while :; do sleep 0.1; done
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "slurm.conf").write_text(TRAINING_CONF)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(cluster: Cluster, *words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return cluster.call(*RUNNER, "--mem", "100", *words, env={**cluster.env, **(env or {})}, timeout=GUARD)


class Started:
    """The runner at work in the background."""

    def __init__(self, cluster: Cluster, *words: object):
        self.cluster = cluster
        command = [*RUNNER, "--mem", "100", *map(str, words)]
        self.output = Path(tempfile.mkstemp(dir=".", prefix="said.")[1])
        with open(self.output, "w") as f:
            given = {"stdin": subprocess.DEVNULL, "stdout": f, "stderr": f, "start_new_session": True}
            self.process = subprocess.Popen(command, env=cluster.env, **given)

    def said(self) -> str:
        return self.output.read_text()

    def until(self, log: str | Path, text: str, times: int = 1) -> None:
        """Wait until a log has a text, so many times."""

        def has() -> bool:
            assert self.process.poll() is None, self.said()
            return os.path.exists(log) and Path(log).read_text().count(text) >= times

        wait_until(has, self.said)

    def id(self, name: str) -> str:
        return Path(f"log/q/{name}.id").read_text().strip()

    def stop(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def ends(self) -> tuple[int, str]:
        """Exit code and what it said."""
        return self.process.wait(GUARD), self.said()


def test_words_and_environment_arrive_unharmed(cluster, place):
    Path("show.py").write_text(
        "import os, sys\n"
        "print(sys.argv[1:])\n"
        "print([os.environ.get(n) for n in ('OF_MINE', 'SLURM_CPUS_PER_TASK', 'SLURM_MEM_PER_CPU')], os.getcwd())\n"
    )
    words = ["a  b", "$(id)", "$HOME", "it's", '"q"', "*", "", "`id`", "JOB/2", "\\", "ä\n;", "%j", "--mem"]
    # As if called from within another job, of which nothing may leak into this one.
    env = {"OF_MINE": "x 'y' $z\n", "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "3", "SLURM_MEM_PER_CPU": "10"}
    done = run(cluster, "JOB=2:3", "log/x y.JOB.log", "python3", "show.py", *words, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = Path("log/x y.3.log").read_text().splitlines()
    assert lines[0].startswith("# command: python3 show.py 'a  b' '$(id)' '$HOME'")
    assert [line[:11] for line in lines[0:1] + lines[2:4]] == ["# command: ", "# host:    ", "# start:   "]
    assert lines[4] == str([w.replace("JOB", "3") for w in words])
    assert lines[5] == f"{[env['OF_MINE'], None, None]} {place}"
    assert lines[6].startswith("# ended:   ") and ", exit code 0, " in lines[6] and lines[6].endswith(" MB")
    assert Path("log/x y.2.log").exists() and not list(Path("log/q").glob("*.id"))


def test_no_more_tasks_at_once_than_asked_for(cluster, place):
    done = run(
        cluster, "--max-jobs-run", 1, "JOB=1:3", "log/x.JOB.log", "bash", "-c", "mkdir busy && sleep 0.5 && rmdir busy"
    )
    assert done.returncode == 0, done.stderr


def test_a_failing_task_is_told_with_reason_and_log(cluster, place):
    script = f"if [ JOB = 2 ]; then echo what went wrong; exit 7; fi; sleep {LONG}"
    done = run(cluster, "JOB=1:3", "log/x.JOB.log", "bash", "-c", script)
    assert done.returncode == 7
    assert (
        "job 2 of 1:3 failed: exit code 7, Slurm says JobState=FAILED Reason=NonZeroExitCode ExitCode=7:0"
        in done.stderr
    )
    assert "log: log/x.2.log" in done.stderr and "what went wrong" in done.stderr
    assert not cluster.jobs()


def test_the_first_rank_to_fail_takes_the_others_down_and_gives_the_code(cluster, place):
    script = f"if [ $SLURM_PROCID = 2 ]; then echo what went wrong; exit 4; fi; sleep {LONG}"
    ranks = ["--num-nodes", 2, "--tasks-per-node", 2, "log/x.log", "srun", "--kill-on-bad-exit=1", "bash", "-c", script]
    done = run(cluster, *ranks)
    assert done.returncode == 4
    assert "exit code 4," in done.stderr and "what went wrong" in done.stderr and not cluster.jobs()


def test_what_sbatch_refuses_is_told(cluster, place):
    done = run(cluster, "--mem", "lots", "log/x.log", "true")
    assert done.returncode == 2 and "sbatch refused: " in done.stderr and "--mem=lots" in done.stderr
    done = run(cluster, "--color", "blue", "log/x.log", "true")
    assert done.returncode == 2 and "unknown option --color" in done.stderr
    done = run(cluster, "log/y.log", "no-such-command")
    assert done.returncode == 127 and "cannot start no-such-command" in done.stderr


def test_tasks_that_cannot_speak_any_more_are_noticed(cluster, place):
    """Cancelled while waiting, cancelled while running, killed for its memory, killed with the script around it."""
    hungry = f"import time; print('here', flush=True); x = bytearray(400_000_000); time.sleep({LONG})"
    waiting = f"echo here; sleep {LONG}"
    started = {
        "waiting": Started(cluster, "--max-jobs-run", 1, "JOB=1:2", "log/waiting.JOB.log", "bash", "-c", waiting),
        "running": Started(cluster, "JOB=1:2", "log/running.JOB.log", "bash", "-c", waiting),
        "memory": Started(cluster, "log/memory.log", "python3", "-c", hungry),
        "script": Started(cluster, "log/script.log", "bash", "-c", f"echo here $PPID.; sleep {LONG}"),
    }
    for name, runner in started.items():
        runner.until(f"log/{name}.log" if name in ("memory", "script") else f"log/{name}.1.log", "\nhere")
    cluster.call("scancel", started["waiting"].id("waiting_0") + "_2")
    cluster.call("scancel", started["running"].id("running_0") + "_1")
    script = re.search(r"here (\d+)\.", Path("log/script.log").read_text())
    os.kill(int(script[1]), signal.SIGKILL)
    said = {}
    for name, runner in started.items():
        code, said[name] = runner.ends()
        assert code != 0, said[name]
    print(*said.values())
    assert "job 2 of 1:2 failed: ended without a last line" in said["waiting"]
    assert "JobState=CANCELLED" in said["waiting"] and "JobState=CANCELLED" in said["running"]
    assert "job 1 of 1:2 failed: exit code 143" in said["running"]
    assert "exceeded memory limit" in said["memory"] and "the job failed: ended without a last line" in said["memory"]
    assert "the job failed: ended without a last line" in said["script"]
    assert not cluster.jobs()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_stopping_the_runner_cancels_its_tasks_for_good(cluster, place, number):
    # The command saves and exits with 75 when it is cancelled; that must not put it back into the queue.
    runner = Started(cluster, "--requeue", "true", "JOB=1:2", "log/x.JOB.log", "bash", "-c", SAVER)
    runner.until("log/x.1.log", "turn 0")
    runner.until("log/x.2.log", "turn 0")
    runner.stop(number)
    code, said = runner.ends()
    assert code == 128 + number and "cancelling Slurm job" in said
    assert not cluster.jobs()
    time.sleep(1)
    assert not cluster.jobs() and "requeued" not in Path("log/x.1.log").read_text()


def test_stopped_while_sbatch_is_at_it(cluster, place):
    bin_dir = place / "bin"
    bin_dir.mkdir()
    (bin_dir / "slow_sbatch").write_text(
        '#!/bin/bash\ntouch begun\nuntil [[ -e go ]]; do sleep 0.1; done\necho "a site says hello"\nexec sbatch "$@"\n'
    )
    (bin_dir / "slow_sbatch").chmod(0o755)
    Path("conf/slurm.conf").write_text(TRAINING_CONF.replace("sbatch ", f"{bin_dir}/slow_sbatch "))
    runner = Started(cluster, "log/x.log", "sleep", LONG)
    wait_until(Path("begun").exists, runner.said)
    runner.stop(signal.SIGINT)
    wait_until(lambda: not has_pending(runner.process.pid, signal.SIGINT), runner.said)
    Path("go").touch()
    code, said = runner.ends()
    assert code == 130 and "cancelling Slurm job" in said and not cluster.jobs()


def test_what_a_killed_runner_left_is_cancelled_by_the_next(cluster, place):
    runner = Started(cluster, "log/x.log", "bash", "-c", f"echo here; sleep {LONG}")
    runner.until("log/x.log", "here")
    runner.stop(signal.SIGKILL)
    runner.ends()
    assert len(cluster.jobs()) == 1
    done = run(cluster, "log/x.log", "echo", "done")
    assert done.returncode == 0 and "of an earlier run that was killed" in done.stderr
    assert "done" in Path("log/x.log").read_text() and not cluster.jobs()


def test_a_saved_state_goes_on_in_another_turn(cluster, place):
    """The signal before a time limit, its owner's `scontrol requeue`, and ranks that exit one after the other."""
    ranks = SAVER.replace("exit 75", "sleep 0.$((SLURM_PROCID * 3)); exit 75")
    started = {
        "warned": Started(cluster, "--requeue", "true", "log/warned.log", "bash", "-c", SAVER),
        "put_back": Started(cluster, "--requeue", "true", "log/put_back.log", "bash", "-c", SAVER),
        "ranks": Started(cluster, "--requeue", "true", "--num-nodes", 2, "--tasks-per-node", 2, "log/ranks.log",
                         "srun", "--kill-on-bad-exit=1", "bash", "-c", ranks),
    }  # fmt: skip
    for name, runner in started.items():
        runner.until(f"log/{name}.log", "turn 0", times=4 if name == "ranks" else 1)
    cluster.call("scancel", "--signal=USR1", "--batch", started["warned"].id("warned"))
    cluster.call("scontrol", "requeue", started["put_back"].id("put_back"))
    cluster.call("scancel", "--signal=TERM", started["ranks"].id("ranks") + ".0")
    for name, runner in started.items():
        code, said = runner.ends()
        log = Path(f"log/{name}.log").read_text()
        assert code == 0 and not said, said + log
        assert all(text in log for text in ("\nturn 0", "\nsaved", ", requeued\n", "\nturn 1")), log


def test_a_reason_to_wait_that_will_not_pass_is_told(cluster, place):
    runner = Started(cluster, "--hold", "true", "log/x.log", "true")
    runner.until(runner.output, "waits: JobHeldUser")
    runner.stop(signal.SIGINT)
    code, said = runner.ends()
    assert code == 130 and not cluster.jobs(), said
