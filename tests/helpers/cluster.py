"""A real Slurm of two nodes on one machine, for tests: started in seconds, without systemd, all in one folder.

Needs Debian's slurm-wlm and munge (or any Slurm of 21.08 or later) and no rights beyond the user's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("node1", "node2")
CPUS = 16  # of each node, whatever the machine has
MEMORY = 200_000  # MB of each node, likewise
GPUS = 4  # of each node, for the scheduler's eyes only: their device files are plain files
SYSTEM_FOLDERS = ("/usr/sbin", "/sbin", "/usr/local/sbin")  # where the daemons are; not on every user's PATH
PATH = os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS])

CONF = """\
ClusterName=sdumctests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued task may start again when the credential of its first start has expired: 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
# A job above its --mem is killed by the daemon's own count, which needs no cgroups.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
GresTypes=gpu
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP
"""


def missing() -> list[str]:
    """Programs that are needed and not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # a killed test run leaves no daemons behind


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class Cluster:
    """munged, slurmctld and two slurmd; `env` is the environment in which Slurm's commands talk to them."""

    def __init__(self) -> None:
        # A short path: a socket's name has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="sdumc-slurm-", dir="/tmp"))
        self.daemons: list[tuple[str, subprocess.Popen]] = []
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.env = {**clean, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start all and wait until both nodes are idle.

        Raises:
            RuntimeError: with the daemons' last words.
        """
        folder = self.folder
        (folder / "state").mkdir()
        for node in NODES:
            (folder / f"spool.{node}").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        devices = [folder / f"gpu{i}" for i in range(GPUS)]
        for device in devices:
            device.touch()
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        (folder / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                folder=folder,
                ports=_free_ports(3),
                cpus=CPUS,
                memory=MEMORY,
                gpus=GPUS,
            )
        )
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        self._until(lambda: (folder / "munge.socket").exists(), "munged opens its socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.states() == dict.fromkeys(NODES, "idle"), "both nodes are idle")

    def stop(self) -> None:
        """Cancel what runs, end the daemons and what they have started, remove the folder."""
        if any(process.poll() is None for _, process in self.daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    ["scancel", "--signal=KILL", f"--user={getpass.getuser()}"],
                    env=self.env,
                    capture_output=True,
                    timeout=60,
                )
        for _, process in reversed(self.daemons):
            process.terminate()
        for _, process in self.daemons:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self._left():  # step daemons that outlived theirs
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def states(self) -> dict[str, str]:
        """Node -> state."""
        text = self.call("sinfo", "--noheader", "--Node", "--format=%N %T").stdout
        return dict(line.split() for line in text.splitlines())

    def call(self, *words: object, timeout: float = 600, **more: object) -> subprocess.CompletedProcess:
        """Run a command in the cluster's environment; its output is text."""
        given = {"env": self.env, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL, **more}
        return subprocess.run([str(word) for word in words], timeout=timeout, **given)

    def jobs(self) -> list[str]:
        """Numbers of the tasks that wait, run or end."""
        return self.call("squeue", "--noheader", "--array", "--format=%A").stdout.split()

    def _daemon(self, name: str, *words: str) -> None:
        program = shutil.which(name, path=PATH)
        with open(self.folder / f"{name}.{len(self.daemons)}.out", "wb") as f:
            process = subprocess.Popen(
                [program, *words],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.daemons.append((name, process))

    def _until(self, true, what: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            ended = [f"{name} ended with code {p.poll()}" for name, p in self.daemons if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = [f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in self._logs()]
                told = "; ".join(ended) or f"not within {seconds:.0f} s: {what}"
                raise RuntimeError("\n".join([f"Slurm did not start: {told}", *logs]))
            time.sleep(0.1)

    def _logs(self) -> list[Path]:
        return sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])

    def _left(self) -> list[int]:
        """Processes that still have this cluster's slurm.conf in their environment."""
        mark = f"SLURM_CONF={self.folder}/".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                pid = int(path.parent.name)
                if pid != os.getpid() and mark in path.read_bytes():
                    found.append(pid)
        return found
