"""What happens when things go wrong: killed launchers and ranks, signals, a full disk, bad input, stages killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import test_training as training
from helpers import bad_inputs, faults
from helpers.commands import call_here
from helpers.dumps import make_dump
from helpers.stopping import at_step, has_pending, held_at_start, wait_until

ROOT = Path(__file__).resolve().parents[2]
RANKS = [sys.executable, "-S", "-E", str(ROOT / "utils/ranks.py"), "2", sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# A training that lasts until it is stopped, with its state saved after every step.
LONG = ["--epochs", "100000", "--save-every", "1", "--num-workers", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_dump(root / "train", 41, 1)
    make_dump(root / "valid", 11, 2)
    return root


class Started:
    """A command with its output in a file, and all processes that it has started, known by a word they inherit."""

    def __init__(self, words: list[object], folder: Path, environment: dict[str, str] | None = None):
        self.token, self.output = f"{os.getpid()}-{time.monotonic_ns()}", folder / "output"
        environment = {**training.ENV, **(environment or {}), "SDUMC_TEST": self.token}
        with open(self.output, "w") as f:
            self.process = subprocess.Popen(list(map(str, words)), env=environment, stdout=f, stderr=f)

    def processes(self, which: str = "") -> list[int]:
        """Those alive whose command line has ``which`` in it."""
        found = []
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"SDUMC_TEST={self.token}".encode() in (
                    Path(entry.path, "environ").read_bytes().split(b"\0")
                ):
                    line = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    state = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[0]
                    if which in line and state != "Z":
                        found.append(int(entry.name))
        return found

    def until(self, happened) -> None:
        wait_until(happened, lambda: self.output.read_text()[-3000:])

    def ends(self) -> int:
        """The exit code."""
        self.until(lambda: self.process.poll() is not None)
        return self.process.returncode

    def all_gone(self) -> None:
        """Left alone the ranks would train for hours."""
        self.until(lambda: not self.processes())

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def steps(exp: Path) -> int:
    import torch

    return torch.load(exp / "checkpoint.pt", weights_only=True)["step"]


def train(data: Path, exp: Path, *more: object, launcher: list[str] | None = None) -> list[object]:
    launcher = [sys.executable] if launcher is None else launcher
    return [*launcher, "-m", "sdumc.bin.train", *training.train_args(data, exp, *LONG, *more)[1:]]


def ranks_of(run: Started) -> list[int]:
    """The training processes, without the launcher. There are no others: features are read by threads."""
    launchers = [*run.processes("ranks.py"), *run.processes("torch.distributed.run")]
    return [pid for pid in run.processes("-m sdumc.bin.train") if pid not in launchers]


# --------------------------------------------------------------------------------------- launchers, ranks, signals


@pytest.mark.parametrize("launcher", [RANKS, TORCHRUN], ids=["ranks.py", "torchrun"])
def test_no_rank_outlives_a_killed_launcher(data, tmp_path, launcher):
    exp = tmp_path / "exp"
    with Started(train(data, exp, launcher=launcher), tmp_path) as run:
        run.until((exp / "checkpoint.pt").exists)
        assert len(ranks_of(run)) == 2
        run.process.kill()
        run.process.wait()
        run.all_gone()
    assert steps(exp) > 0  # whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_saves_and_ends_with_75(data, tmp_path, number):
    exp = tmp_path / "exp"
    with Started(train(data, exp, launcher=RANKS), tmp_path) as run:
        run.until((exp / "checkpoint.pt").exists)
        run.process.send_signal(number)
        assert run.ends() == 75
        run.all_gone()
        assert "stopped by a signal" in run.output.read_text() and "Traceback" not in run.output.read_text()
    done = steps(exp)
    again = call_here(*training.train_args(data, exp, *LONG, "--epochs", 1 + done // 6))
    assert again.returncode == 0 and f"resuming at epoch {1 + done // 6}, step {done}" in again.stderr, again.stderr


def test_a_signal_while_training_starts(data, tmp_path):
    """It is held back or remembered until there is something to save, and the run ends in the agreed way."""
    exp = tmp_path / "exp"
    with Started(train(data, exp, launcher=RANKS), tmp_path, held_at_start(training.ENV, tmp_path)) as run:
        run.until(lambda: len(list(tmp_path.glob("held.*"))) == 2)
        run.process.send_signal(signal.SIGUSR1)
        # The launcher has passed it on when both ranks have it pending.
        run.until(lambda: all(has_pending(pid, signal.SIGUSR1) for pid in ranks_of(run)))
        (tmp_path / "go").touch()
        assert run.ends() == 75
    assert steps(exp) == 1


def test_a_killed_rank_takes_the_other_down(data, tmp_path):
    exp = tmp_path / "exp"
    with Started(train(data, exp, launcher=RANKS), tmp_path) as run:
        run.until((exp / "checkpoint.pt").exists)
        children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert run.ends() == 137
        assert "rank 1 of 2 failed first, exit code 137" in run.output.read_text()
        run.all_gone()


BROKEN = """
import sys
from sdumc.bin import train
from sdumc.training import distributed
before = distributed.gather_rows
def broken(x, total, ranks):
    if ranks.rank == 1:
        raise ValueError("this rank has a fault of its own")
    return before(x, total, ranks)
distributed.gather_rows = broken
train.run(train.main)
"""


def test_a_rank_with_an_error_shows_it_and_ends_the_run(data, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    words = train(data, tmp_path / "exp", launcher=RANKS)
    words[words.index("-m") : words.index("-m") + 2] = [tmp_path / "broken.py"]
    with Started(words, tmp_path) as run:
        assert run.ends() == 1
        text = run.output.read_text()
        assert "ValueError: this rank has a fault of its own" in text and "rank 1 of 2 failed first" in text
        run.all_gone()


def test_two_trainings_in_one_folder(data, tmp_path, monkeypatch):
    from sdumc.errors import UserError
    from sdumc.training.checkpoint import lock_folder

    held = lock_folder(tmp_path)
    with pytest.raises(UserError, match="another training works in this folder"):
        lock_folder(tmp_path, patience=0.3)
    os.close(held)
    os.close(lock_folder(tmp_path, patience=0))


# ------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint(data, small_disk):
    exp = small_disk / "exp"
    assert training.call(*training.train_args(data, exp, "--epochs", 1)).returncode == 0
    before = {p: p.read_bytes() for p in exp.glob("*.*")}
    with open(small_disk / "filler", "wb", buffering=0) as f:
        with contextlib.suppress(OSError):
            while f.write(b"x" * 4096):
                pass
        f.truncate(f.tell() - 120 * 1024)  # room for the weights, not for a checkpoint of 300 KB
    done = training.call(*training.train_args(data, exp, "--epochs", 9))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {exp}/checkpoint.pt: could not be written (No space left on device)"), done.stderr
    assert "Traceback" not in done.stderr
    for path in before:
        if path.name not in ("train.log", "config.yaml"):  # the log; and the number of epochs is another
            assert path.read_bytes() == before[path], path
    (small_disk / "filler").unlink()
    assert training.call(*training.train_args(data, exp, "--epochs", 2)).returncode == 0
    assert steps(exp) == 12


def test_a_checkpoint_that_cannot_be_written_to_its_end(tmp_path):
    """The limit of the size of files stands for a full disk: also where none can be mounted."""
    from sdumc.errors import UserError
    from sdumc.training.checkpoint import load_checkpoint, save_checkpoint

    torch = pytest.importorskip("torch")
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint\.pt: could not be written \(File too large\)"):
            save_checkpoint(path, {"step": 2, "model": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path, {}) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_features_that_do_not_fit(tmp_path):
    """What was committed is kept; the job goes on from there when there is room again."""
    from sdumc.data.shards import ShardWriter
    from sdumc.errors import UserError

    def write(ids: str) -> None:
        with ShardWriter(tmp_path, "audio", 1, {}) as writer:
            for utt in ids:
                if utt not in writer.done:
                    writer.write(utt, np.ones((100, 20)))
                    writer.commit()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"audio\.1\.ark\.partial: could not be written \(File too large\)"):
            write("abc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with contextlib.closing(ShardWriter(tmp_path, "audio", 1, {})) as writer:
        assert writer.done == {"a", "b"}
    write("abc")
    assert (tmp_path / "ark/audio.1.ark").stat().st_size == 3 * (100 * 20 * 4 + 17)


# ------------------------------------------------------------------------------------------ stages killed, bad input


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A few kills of training and decoding: the folder they were done in, the trials, and what was said."""
    root, lines = tmp_path_factory.mktemp("killed"), []
    for seed, (name, count) in enumerate((("train", 24), ("valid", 6), ("test", 6))):
        make_dump(root / "features" / name, count, seed)
    stages, trials = faults.campaign(root / "work", [4, 5], 3, 1, lines.append, root / "features")
    return root / "work", stages, trials, "\n".join(lines)


def test_stages_killed_at_random_moments_end_with_the_same_files(killed):
    """docs/faults.md has the table of tests/helpers/faults.py, with every stage."""
    _, stages, trials, said = killed
    assert sum(len(t.kills) for t in trials) == 3, said
    assert not any(t.wrong for t in trials), said
    assert all(t.compared > 20 for t in trials)
    assert "| 4 train |" in faults.table(stages, trials, 1)


def test_a_signal_to_the_ranks_of_a_recipe(killed):
    """Stage 4 saves and ends with 75; the same command ends with the files of an undisturbed run."""
    work = killed[0]
    recipe, output, token = work / "egs/signal", work / "output", f"{os.getpid()}-signal"
    shutil.copytree(work / "states/4", recipe, symlinks=True)
    # To utils/ranks.py, the ranks' parent.
    process = faults.start(recipe, 4, token, output, at_step(os.environ, 2, signal.SIGUSR1, "parent"))
    assert process.wait() == 75, output.read_text()
    assert "the same command goes on from here" in output.read_text()
    assert faults.start(recipe, 4, token, output).wait() == 0, output.read_text()
    assert "going on" in output.read_text()
    assert faults.differences(recipe, work / "states/5")[1] == []


def test_a_difference_is_found(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "exp/log").mkdir(parents=True)
        (tmp_path / name / "exp/same").write_text("1")
        (tmp_path / name / "exp/log/x.log").write_text(name)
    assert faults.differences(tmp_path / "a", tmp_path / "b") == (1, [])
    (tmp_path / "a/exp/same").write_text("2")
    (tmp_path / "a/exp/.left.tmp").write_text("")
    (tmp_path / "b/exp/gone").write_text("")
    assert faults.differences(tmp_path / "a", tmp_path / "b")[1] == [
        "exp/gone: missing",
        "exp/.left.tmp: left over",
        "exp/same: differs",
    ]


def test_what_bad_input_prints(tmp_path):
    """Every message names what it is about, and docs/faults.md shows it as it is."""
    output = tmp_path / "results.json"
    command = [sys.executable, ROOT / "tests/helpers/bad_inputs.py", "--json", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.exists(), done.stderr
    results = [bad_inputs.Result(**r) for r in json.loads(output.read_text())]
    wrong = [f"{r.title}: {r.wrong}" for r in results if r.wrong]
    assert done.returncode == 0 and not wrong, "\n".join(wrong)
    page = (ROOT / "docs/faults.md").read_text()
    section = re.search(r"<!-- bad inputs: begin[^>]*-->\n(.*?)<!-- bad inputs: end -->", page, flags=re.S)
    shown, fresh = (bad_inputs.without_numbers(text).splitlines() for text in (section[1], bad_inputs.listing(results)))
    assert shown == fresh, "run tests/helpers/bad_inputs.py --page docs/faults.md"
