#!/usr/bin/env python3
"""Kill every stage of a small egs/mini at random moments, run it again, and compare with a run never killed.

    tests/helpers/faults.py [--kills 35] [--seed 1] [--stages 0 1 2 3 4 5 6] [--work-dir DIR] [--page docs/faults.md]

Each stage is first run undisturbed. A trial starts from the files that stood before the stage, kills the run once or
twice with SIGKILL, then lets it end, and compares every file with the undisturbed run's, byte by byte. Half of the
kills come at a random time, the others when a random file (a temporary one, more often) is first seen. Half of them
hit every process that the recipe has started, as when a machine fails; the others only the recipe's own process group,
so that its jobs must notice by themselves. Prints a table; --page writes it into a page. Exit code 1: a file differed,
a process was left behind, or a run that went on failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.recipes import make_small_mini

# Small steps, saved often: there is much to be caught in the middle of.
SETTINGS = {
    "asr": "batch-size: 3\n",
    "audio": "layer: -2\nbatch-size: 3\n",
    "text": "context: audio+prompt\nprompt: short\nlayers: [1]\nfirst-state: drop\nbatch-size: 3\n",
    "video": "fps: 5\npooling: cls\ndetector: none\nbatch-size: 3\n",
    "simulation": "prompt: short\nlayers: [1]\nfirst-state: drop\nbeam: 2\nmax-new-tokens: 6\nbatch-size: 3\n",
    "projector": "k: 5\nhidden: 32\nsteps: 12\nbatch-size: 4\nwarmup-steps: 1\nvalid-interval: 4\n"
    "max-new-tokens: 5\ncheckpoint-interval: 2\n",
    "train": "batch-size: 6\nepochs: 4\nlr: 0.001\ndim: 32\ncontent-dim: 16\nsave-every: 1\nwarmup-epochs: 1\n"
    "average-best: 2\nnum-workers: 1\n",
}
NAMES = ("corpus", "data", "text", "features", "train", "decode", "report")
# What may differ, and why.
EXCEPTIONS = {
    r"(^|/)log/": "logs: times, and what the killed run had said",
    r"(^|/)train\.log$": "logs: times, and what the killed run had said",
    r"(^|/)tensorboard/": "event files have the time in their names and records; a run that goes on adds a file",
    r"^\.done/": "notes of the steps: times of the files, by which the next run sees what is up to date",
}
TOKEN = "SDUMC_FAULTS"
GOING_ON = re.compile(r"continuing after|resuming at|going on")


# ------------------------------------------------------------------------------------------------------- processes


def processes(token: str) -> list[int]:
    """Every process that a run has started, also those that have left its process group."""
    wanted, found = f"{TOKEN}={token}".encode(), []
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted in Path(entry.path, "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def kill_all(token: str) -> None:
    """SIGKILL to all of them as good as at once: stopped first, so that none reacts to another's death."""
    for number in (signal.SIGSTOP, signal.SIGSTOP, signal.SIGKILL):
        for pid in processes(token):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    while processes(token):
        time.sleep(0.01)


def start(folder: Path, stage: int, token: str, output: Path, env: Mapping[str, str] = os.environ) -> subprocess.Popen:
    env = {**env, TOKEN: token, "OMP_NUM_THREADS": "1"}
    words = ["./run.sh", "--ngpu", "0", "--nproc", "2", "--stage", str(stage), "--stop-stage", str(stage)]
    with open(output, "w") as f:
        return subprocess.Popen(words, cwd=folder, env=env, stdout=f, stderr=f, start_new_session=True)


# ----------------------------------------------------------------------------------------------------------- files


def paths(folder: Path) -> dict[str, int]:
    """Every file that a stage can write, by path in the recipe: its time."""
    found: dict[str, int] = {}

    def walk(directory: str, prefix: str) -> None:
        with contextlib.suppress(OSError):
            for entry in os.scandir(directory):
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in ("conf", "local"):
                        walk(entry.path, f"{prefix}{entry.name}/")
                elif not entry.is_symlink():
                    with contextlib.suppress(OSError):
                        found[prefix + entry.name] = entry.stat().st_mtime_ns

    walk(str(folder), "")
    return found


def is_exception(path: str) -> bool:
    return any(re.search(pattern, path) for pattern in EXCEPTIONS)


def differences(folder: Path, expected: Path) -> tuple[int, list[str]]:
    """How many files were compared, and what is wrong with which."""
    ours, theirs = ({p for p in paths(f) if not is_exception(p)} for f in (folder, expected))
    wrong = [f"{p}: missing" for p in sorted(theirs - ours)] + [f"{p}: left over" for p in sorted(ours - theirs)]
    for path in sorted(ours & theirs):
        a, b = folder / path, expected / path
        if a.read_bytes() != b.read_bytes() and not (path.endswith("checkpoint.pt") and same_content(a, b)):
            wrong.append(f"{path}: differs")
    return len(theirs), wrong


def same_content(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same, every tensor to the bit.

    Their bytes depend on which of the equal values are the same Python object, which pickle writes only once.
    """
    import torch

    def same(x, y) -> bool:
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        if isinstance(x, list | tuple):
            return len(x) == len(y) and all(map(same, x, y))
        return x == y

    return same(*(torch.load(path, weights_only=True) for path in (a, b)))


# ---------------------------------------------------------------------------------------------------------- trials


@dataclass
class Stage:
    """What the undisturbed run of a stage has shown."""

    number: int
    seconds: float
    seen: list[str]  # files that appeared or changed, in order of their first sight
    passing: list[str]  # those of them that were gone at the end


@dataclass
class Kill:
    seconds: float
    moment: str
    whole: bool  # every process, not just the recipe's group
    during: str  # what the recipe was at


@dataclass
class Trial:
    stage: int
    kills: list[Kill] = field(default_factory=list)
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    kept: int = 0  # steps that the last run found done
    redone: int = 0
    went_on: list[str] = field(default_factory=list)  # lines of logs
    seconds: float = 0.0  # of the last run


def undisturbed(folder: Path, number: int, output: Path) -> Stage:
    before, seen = paths(folder), {}
    begin = time.monotonic()
    process = start(folder, number, f"{os.getpid()}-undisturbed", output)
    while process.poll() is None:
        for path, changed in paths(folder).items():
            if before.get(path) != changed:
                seen.setdefault(path, time.monotonic())
        time.sleep(0.003)
    if process.returncode:
        raise SystemExit(f"the undisturbed run of stage {number} failed:\n{output.read_text()}")
    seconds, last = time.monotonic() - begin, paths(folder)
    files = [p for p in sorted(seen, key=seen.__getitem__) if "log/" not in p]
    return Stage(number, seconds, files, [p for p in files if p not in last])


def one_kill(folder: Path, stage: Stage, rng: random.Random, token: str, output: Path, attempt: int) -> Kill | None:
    """Run the stage and kill it; None if it ended before.

    A run may be faster than the undisturbed one was, and a file can pass unseen: each further ``attempt`` is earlier,
    and not on sight of a file, so that one of them comes in time.

    Raises:
        RuntimeError: it failed.
    """
    whole = rng.random() < 0.5
    target, moment = None, rng.uniform(0.02, 0.97) * stage.seconds * 0.6**attempt
    if attempt == 0 and rng.random() < 0.5 and stage.seen:
        target = rng.choice(stage.passing if stage.passing and rng.random() < 0.6 else stage.seen)
    before = paths(folder)
    begin = time.monotonic()
    process = start(folder, stage.number, token, output)
    while process.poll() is None:
        now = time.monotonic() - begin
        if target is None and now >= moment:
            break
        if target is not None:
            changed = paths(folder).get(target)
            if changed is not None and changed != before.get(target):
                break
        time.sleep(0.002)
    if process.poll() is not None:
        if process.returncode:
            raise RuntimeError(f"the run after a kill failed: {output.read_text()[-1500:]}")
        return None
    seconds = time.monotonic() - begin
    if whole:
        kill_all(token)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    running = re.findall(r"^  run    (.*?) \([^()]*\) \.\.\. (.*)$", output.read_text(), flags=re.M)
    during = next((names for names, end in running if not end), "between two steps")
    return Kill(seconds, f"on sight of `{target}`" if target else f"after {seconds:.1f} s", whole, during)


def sizes_of_logs(folder: Path) -> dict[str, int]:
    return {p: (folder / p).stat().st_size for p in paths(folder) if p.endswith(".log")}


def trial(states: Path, folder: Path, stage: Stage, rng: random.Random, kills: int, label: str) -> Trial:
    """Kill a stage ``kills`` times, let it end, compare."""
    result, tokens, output = Trial(stage.number), [], folder.with_name("output")
    try:
        for attempt in range(12):  # all from the beginning when a kill came too late
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(states / str(stage.number), folder, symlinks=True)
            result.kills = []
            while len(result.kills) < kills:
                tokens.append(f"{os.getpid()}-{label}-{len(tokens)}")
                kill = one_kill(folder, stage, rng, tokens[-1], output, attempt)
                if kill is None:
                    break
                result.kills.append(kill)
            else:
                break
        else:
            raise RuntimeError("no kill came before the end")
        logs = sizes_of_logs(folder)
        begin = time.monotonic()
        if start(folder, stage.number, tokens[0] + "-again", output).wait():
            raise RuntimeError(f"the run after a kill failed: {output.read_text()[-1500:]}")
    except RuntimeError as e:
        result.wrong.append(str(e))
        return result
    result.seconds = time.monotonic() - begin
    text = output.read_text()
    for action, names in re.findall(r"^  (run|skip)   +(.*?) \([^()]*\)", text, flags=re.M):
        count = names.count(", ") + 1
        result.kept, result.redone = result.kept + count * (action == "skip"), result.redone + count * (action == "run")
    for path in (p for p in paths(folder) if p.endswith(".log")):
        content = (folder / path).read_bytes()
        old = logs.get(path, 0)
        fresh = content[old:] if path.endswith("/train.log") and old < len(content) else content
        lines = [line for line in fresh.decode(errors="replace").splitlines() if GOING_ON.search(line)]
        result.went_on += [re.sub(r"^[-\d]+ [:\d]+ (INFO )?(\[rank 0\] )?", "", line) for line in lines]
    result.went_on = sorted(set(result.went_on))
    result.compared, result.wrong = differences(folder, states / str(stage.number + 1))
    for token in tokens:
        if left := processes(token):
            result.wrong.append(f"{len(left)} processes of the killed run are left")
            kill_all(token)
    return result


def read_trial(line: str) -> Trial:
    fields = json.loads(line)
    return Trial(**{**fields, "kills": [Kill(**kill) for kill in fields["kills"]]})


def campaign(
    work: Path, stages: list[int], kills: int, seed: int, say=print, features: Path | None = None
) -> tuple[list[Stage], list[Trial]]:
    """All of it; ``kills`` are dealt out over the stages, one and two to a trial in turn.

    With ``features``, a folder of dump folders from elsewhere, the recipe begins with stage 4.
    """
    folder, states, first = work / "egs" / "mini", work / "states", work / "states" / ("0" if features is None else "4")
    if not first.exists():
        make_small_mini(work)
        for name, text in SETTINGS.items():
            (folder / "conf" / f"{name}.yaml").write_text(text)
        if features is not None:
            shutil.copytree(features, folder / "dump")
        shutil.copytree(folder, first, symlinks=True)
    known = {}
    for number in range(0 if features is None else 4, max(stages) + 1):
        facts = work / f"stage-{number}.json"
        if facts.exists():  # of a campaign that was cut short
            known[number] = Stage(**json.loads(facts.read_text()))
            continue
        shutil.rmtree(folder)
        if not (states / str(number)).exists():
            raise SystemExit(f"{work}: no files to begin stage {number} with; choose another --work-dir")
        shutil.copytree(states / str(number), folder, symlinks=True)
        known[number] = stage = undisturbed(folder, number, work / "output")
        shutil.rmtree(states / str(number + 1), ignore_errors=True)
        shutil.copytree(folder, states / str(number + 1), symlinks=True)
        facts.write_text(json.dumps(asdict(stage)))
        say(f"stage {number}: {stage.seconds:.1f} s, {len(stage.seen)} files, {len(stage.passing)} passing")
    record = work / "trials.jsonl"
    trials = [read_trial(line) for line in record.open()] if record.exists() else []
    for number in stages:
        done = sum(len(t.kills) for t in trials if t.stage == number)
        left = kills // len(stages) + (stages.index(number) < kills % len(stages)) - done
        rng = random.Random(f"{seed} {number} {done}")
        while left > 0:
            count = min(left, 1 + len(trials) % 2)
            t = trial(states, work / "egs" / "trial", known[number], rng, count, f"{len(trials)}")
            trials.append(t)
            with record.open("a") as f:
                f.write(json.dumps(asdict(t)) + "\n")
            left -= max(1, len(t.kills))
            for kill in t.kills:
                who = "all processes" if kill.whole else "the recipe's group"
                say(f"stage {number}: {who} killed {kill.moment} ({kill.seconds:.1f} s), during: {kill.during}")
            say(
                f"  then {t.kept} steps kept, {t.redone} run, {t.compared} files compared; {'; '.join(t.went_on)[:300]}"
            )
            for problem in t.wrong:
                say(f"  WRONG {problem}")
    return list(known.values()), trials


# ------------------------------------------------------------------------------------------------------------ page


def table(stages: list[Stage], trials: list[Trial], seed: int) -> str:
    """The page's section in Markdown."""
    total = sum(len(t.kills) for t in trials)
    again = sum(len(t.kills) > 1 for t in trials)
    lines = [
        f"{total} kills in {len(trials)} trials ({again} with a second kill while the first was being made good), seed "
        f"{seed}: **{sum(len(t.wrong) for t in trials)} files or processes not as they should be**.",
        "",
        "| stage | undisturbed, s | kills: all processes | recipe only | moments, s | during | steps kept "
        "| steps run again | files compared | differ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in stages:
        own = [t for t in trials if t.stage == stage.number]
        if not own:
            continue
        kills = [k for t in own for k in t.kills]
        moments = ", ".join(f"{k.seconds:.1f}" for k in kills)
        during = ", ".join(sorted({name for k in kills for name in [re.sub(r",.*", " ...", k.during)]}))
        lines.append(
            f"| {stage.number} {NAMES[stage.number]} | {stage.seconds:.0f} | {sum(k.whole for k in kills)} "
            f"| {sum(not k.whole for k in kills)} | {moments} | {during} | {sum(t.kept for t in own)} "
            f"| {sum(t.redone for t in own)} | {own[0].compared} | {sum(len(t.wrong) for t in own)} |"
        )
    sights = sorted({k.moment.removeprefix("on sight of ") for t in trials for k in t.kills if "sight" in k.moment})
    lines += ["", "Files at whose first sight a kill came: " + ", ".join(sights) + ".", ""]
    went_on = sorted({re.sub(r"^.*?: ", "", line) for t in trials for line in t.went_on})
    lines += ["What steps said that went on inside: " + "; ".join(f"`{line}`" for line in went_on) + "."]
    lines += ["", "Not compared:", ""]
    reasons: dict[str, list[str]] = {}
    for pattern, reason in EXCEPTIONS.items():
        reasons.setdefault(reason, []).append(re.sub(r"\(\^\|/\)|[\^$\\]", "", pattern))
    lines += [f"* {', '.join(f'`{p}`' for p in patterns)}: {reason}" for reason, patterns in reasons.items()]
    lines += ["* `checkpoint.pt` is compared by its content, every tensor to the bit: equal Python objects are written "
              "once or twice"]  # fmt: skip
    return "\n".join(lines) + "\n"


def replace_section(page: Path, name: str, content: str) -> None:
    """Put ``content`` between the page's marks for ``name``."""
    pattern = rf"(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)"
    text, count = re.subn(pattern, lambda m: m[1] + content + m[2], page.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit(f"{page}: no marks `<!-- {name}: begin -->` and `<!-- {name}: end -->`")
    page.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=35, help="over all stages (default 35)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parser.add_argument("--stages", type=int, nargs="+", default=list(range(7)), help="to kill (default all)")
    parser.add_argument("--work-dir", type=Path, help="where to work, and to go on when cut short")
    parser.add_argument("--page", type=Path, help="page to write the table into")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sdumc-faults-") as temporary:
        work = args.work_dir or Path(temporary)
        stages, trials = campaign(work, args.stages, args.kills, args.seed, lambda line: print(line, flush=True))
    print(content := table(stages, trials, args.seed))
    if args.page:
        replace_section(args.page, "kills", content)
    return int(any(t.wrong for t in trials))


if __name__ == "__main__":
    sys.exit(main())
