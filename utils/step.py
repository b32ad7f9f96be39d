#!/usr/bin/env python3
"""Run a step of a recipe unless it is up to date.

    step.py --name NAME [--inputs F...] [--optional-inputs F...] [--settings F...] [--outputs F...] [--stale F...]
            [--ignore NAME...] [--force] [--state-dir .done]
            -- [RUNNER... --] COMMAND... [--then [RUNNER... --] COMMAND...]... [--next --name ...]...

A step is up to date when all its outputs exist and neither its commands nor its inputs have changed since it last
succeeded. Inputs, optional inputs and settings are files, folders or quoted patterns ('dump/train/*.scp'). They are
compared by size and modification time. All but the optional ones must exist. RUNNER is a job runner with its options
and log, or ranks.py; it is not compared. Options named by --ignore (without their dashes) are not compared either,
nor are their values: `--ignore device` ignores `--device cuda`, which does not change the result.

The commands run one after the other until one fails. An interrupted command is expected to continue where it stopped,
so nothing is deleted between two attempts. But when an input has changed, or with --force, the files that `--stale`
names are deleted first, because they were made from other inputs. Changed settings files and options delete nothing:
the commands check these themselves. When two recipes reach the same step at the same time, the second waits, and the
step is done once.

After `--next` comes another step of the same kind, such as the same feature of another set. Those steps that are not
up to date are done together: their commands, each `python3 -m MODULE ...`, run in one process by utils/several.py,
with the first step's runner.

Prints one line. The exit code is that of the command that failed.
"""

# Every recipe calls this dozens of times, and usually there is nothing to do. To start in 30 ms, it imports what only a
# running step needs inside the functions.
import fcntl
import glob
import json
import os
import sys
import time
from zlib import crc32

LISTS = ("--inputs", "--optional-inputs", "--settings", "--outputs", "--stale", "--ignore")
VALUES = ("--name", "--state-dir")


def fail(message: str) -> None:
    print(f"step.py: error: {message}", file=sys.stderr)
    sys.exit(2)


class Step:
    """One step, as the command line describes it, and the files in which its last run is recorded."""

    def __init__(self, words: list[str]):
        options: dict = {name: [] for name in LISTS} | {"--name": "", "--state-dir": ".done", "--force": False}
        words = list(words)
        target: list[str] | None = None
        while words and words[0] != "--":
            word = words.pop(0)
            if word in LISTS:
                target = options[word]
            elif word in VALUES:
                target = None
                if not words:
                    fail(f"option {word} needs a value")
                options[word] = words.pop(0)
            elif word == "--force":
                target = None
                options[word] = True
            elif word.startswith("--") or target is None:
                fail(f"unexpected word {word!r}; the command comes after --")
            elif word:
                target.append(word)
        self.options, self.force = options, options["--force"]
        self.name, self.outputs, self.folder = options["--name"], options["--outputs"], options["--state-dir"]
        self.commands: list[tuple[list[str], list[str]]] = []  # runner, command
        for segment in split(words[1:], "--then"):
            runner, *rest = split(segment, "--", 1)
            self.commands.append((runner, rest[0]) if rest else ([], runner))
        if not self.name or not all(command for _, command in self.commands):
            fail("usage: step.py --name NAME [options] -- [RUNNER... --] COMMAND...; --help explains the options")
        # The hash of the first output distinguishes steps of the same name in other folders.
        slug = "".join(c if c.isalnum() else "-" for c in self.name)
        slug += f"-{crc32('|'.join([self.name, *self.outputs[:1]]).encode()):08x}"
        self.done_file, self.started_file, self.lock_file = (
            os.path.join(self.folder, slug + ending) for ending in (".done", ".started", ".lock")
        )

    def signature(self) -> dict:
        """The commands, inputs and settings on which the step's result depends, as they are now."""
        options = self.options
        return {
            "commands": [without_ignored(command, options["--ignore"]) for _, command in self.commands],
            "inputs": stamps(options["--inputs"], needed_by=self.name) + stamps(options["--optional-inputs"]),
            "settings": stamps(options["--settings"], needed_by=self.name),
        }

    def reason_to_run(self, now: dict) -> str:
        """Why the step is not up to date; empty when it is."""
        if self.force:
            return "forced"
        missing = self.missing()
        return change(load(self.done_file), now) or (f"missing: {missing}" if missing else "")

    def missing(self) -> str:
        return next((path for path in self.outputs if not stamp(path)), "")

    def begin(self, now: dict) -> str:
        """Prepare for the commands; returns the reason to run them, in a word or two."""
        reason = self.reason_to_run(now)
        last = load(self.started_file) or load(self.done_file)
        if reason == "new" and last is not None and last["inputs"] == now["inputs"]:
            reason = "going on"
        if self.force or (last is not None and last["inputs"] != now["inputs"]):
            delete(self.options["--stale"])
        save(self.started_file, now)
        if os.path.exists(self.done_file):  # the outputs that it describes are about to change
            os.unlink(self.done_file)
        return reason

    def end(self) -> None:
        os.replace(self.started_file, self.done_file)


def split(words: list[str], separator: str, at_most: int = -1) -> list[list[str]]:
    """Like str.split, for a list of words."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator and at_most != len(parts) - 1:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def stamp(path: str) -> list[list]:
    """[path, size, time in ns] of a file, of every file in a folder, or of all that a pattern matches; [] if none."""
    try:
        status = os.stat(path)
    except OSError:
        if not glob.has_magic(path):
            return []
        return [entry for match in sorted(glob.glob(path)) for entry in stamp(match)]
    if not os.path.isdir(path):
        return [[path, status.st_size, status.st_mtime_ns]]
    found = []
    for entry in sorted(os.scandir(path), key=lambda e: e.name):
        if not entry.name.startswith("."):
            found += stamp(entry.path)
    return found


def stamps(paths: list[str], needed_by: str = "") -> list[list]:
    found = []
    for path in paths:
        mine = stamp(path)
        if not mine and needed_by:
            print(
                f"step.py: error: {needed_by} needs {path}, which is not there or empty; an earlier stage makes it",
                file=sys.stderr,
            )
            sys.exit(1)
        found += mine
    return found


def without_ignored(command: list[str], ignored: list[str]) -> list[str]:
    """The command's words without the ignored options and their values."""
    kept: list[str] = []
    skip = False
    for word in command:
        option = word.startswith("--") and word[2:].partition("=")[0] in ignored
        if not skip and not option:
            kept.append(word)
        skip = option and "=" not in word and not skip
    return kept


def change(old: dict | None, new: dict) -> str:
    """Why the step is not up to date, in a word or two; empty when it is."""
    if old is None:
        return "new"
    for key in ("inputs", "settings"):
        if old.get(key) != new[key]:
            before = {tuple(e) for e in old.get(key) or []}
            after = {tuple(e) for e in new[key]}
            names = sorted({e[0] for e in before ^ after})
            return f"changed: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else key
    return "other options" if old.get("commands") != new["commands"] else ""


def load(path: str) -> dict | None:
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def save(path: str, value: dict) -> None:
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(value, f)
    os.replace(temporary, path)


def lock(path: str, name: str):
    """Lock the step; wait while another recipe has it locked. The lock ends when this process ends, even if killed."""
    f = open(path, "a")  # noqa: SIM115 (held until this process ends)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"  wait   {name} (another recipe is doing it)", flush=True)
        fcntl.flock(f, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass
    return f


def delete(patterns: list[str]) -> None:
    import shutil

    for pattern in patterns:
        for path in glob.glob(pattern):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def run(command: list[str]) -> int:
    """Run a command with this process's streams. It gets the stop signals of this process, and dies with it."""
    import signal
    import subprocess

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import jobs

    caught = []
    process = None

    def pass_on(number, _frame):
        caught.append(number)
        # Ctrl-C reaches all processes of the foreground group; other signals reach only this process.
        if process is not None and number != signal.SIGINT:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    jobs.die_with_parent()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=jobs.in_child)
    except OSError as e:
        print(f"\nstep.py: error: cannot start {command[0]}: {e.strerror}", file=sys.stderr)
        return 127
    code = process.wait()
    if caught:
        return 128 + caught[0]
    return code if code >= 0 else 128 - code


def together(steps: list[Step]) -> list[list[str]]:
    """The command lines that do all of these steps."""
    lines = []
    for same in zip(*(step.commands for step in steps), strict=True):
        runner = same[0][0]
        if len(steps) == 1:
            lines.append(runner + same[0][1])
            continue
        joined = [*runner, "python3", os.path.join(os.path.dirname(os.path.abspath(__file__)), "several.py")]
        for i, (_, command) in enumerate(same):
            if command[:2] != ["python3", "-m"]:
                fail(f"steps after --next need commands of the form `python3 -m MODULE`, not {command[0]!r}")
            joined += ["--then"] * (i > 0) + command[2:]
        lines.append(joined)
    return lines


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__.strip())
        return 0 if argv else 2
    steps = [Step(words) for words in split(argv, "--next")]
    if len({len(step.commands) for step in steps}) > 1:
        fail("steps joined by --next have equally many commands")
    todo = [step for step in steps if step.reason_to_run(step.signature())]
    held = []
    for step in todo:
        os.makedirs(step.folder, exist_ok=True)
        held.append(lock(step.lock_file, step.name))
    # Check again: another recipe may have done it while this one waited.
    pending = [(step, now) for step in todo if step.reason_to_run(now := step.signature())]
    todo = [step for step, _ in pending]
    if done := [step.name for step in steps if step not in todo]:
        print(f"  skip   {', '.join(done)} (up to date)", flush=True)
    if not todo:
        return 0

    names = ", ".join(step.name for step in todo)
    reasons = [step.begin(now) for step, now in pending]
    print(f"  run    {names} ({reasons[0]}) ... ", end="", flush=True)
    start = time.monotonic()
    for command in together(todo):
        code = run(command)
        if code != 0:
            print(f"failed   {names} after {time.monotonic() - start:.1f} s", flush=True)
            return code
    for step in todo:
        if step.missing():
            print(f"failed   {step.name}: it ended without an error, but {step.missing()} is missing", flush=True)
            return 1
        step.end()
    print(f"{time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
